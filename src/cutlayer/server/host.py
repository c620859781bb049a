"""The trunk and everything that lives on it: runs, sessions and their adapters.

One method per frame kind, plain values in and out. Only the runner thread calls it; it does not
know frames, codecs, certificates or rights.

Shapes: N = tokens of all rows of a call, D = hidden size.
"""

import itertools
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from cutlayer.errors import ConfigError, PermissionRefused, ProtocolError, StepExpired
from cutlayer.model.adapters import Adapter, AdapterSettings, AdapterState, attach, base_only
from cutlayer.model.kv_cache import bytes_per_token
from cutlayer.model.partition import Trunk
from cutlayer.model.rows import Rows
from cutlayer.server.graphs import GraphBudget
from cutlayer.server.runs import TrainingRun, load_adapter_state, run_folder, saved_settings
from cutlayer.server.sessions import Session, SessionTable
from cutlayer.server.settings import LimitSettings
from cutlayer.settings import parse_settings
from cutlayer.storage.steps import StepStore
from cutlayer.storage.vault import Vault
from cutlayer.wire.messages import Backward, Commit, Decode, Forward, OpenRun, OpenSession

__all__ = ["TrunkHost"]


class TrunkHost:
    """All state that calls of the trunk share."""

    def __init__(
        self,
        trunk: Trunk,
        limits: LimitSettings,
        state_folder: Path,
        vault: Vault,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._trunk = trunk
        self._limits = limits
        self._folder = state_folder
        self._vault = vault
        self._clock = clock
        self._graphs = GraphBudget(limits.max_graph_bytes)
        self._runs: dict[tuple[str, str], TrainingRun] = {}
        self._last_used_s: dict[tuple[str, str], float] = {}
        self._names = itertools.count()
        self._generation_adapters: dict[str, Adapter] = {}
        token_bytes = bytes_per_token(trunk, next(trunk.parameters()).dtype)
        self.sessions = SessionTable(limits.session_limits(), token_bytes, len(trunk.block_range))

    @property
    def num_runs(self) -> int:
        """Runs in memory."""
        return len(self._runs)

    @property
    def max_call_tokens(self) -> int:
        """Tokens that one call may have."""
        return self._limits.max_call_tokens

    @property
    def session_ttl_s(self) -> float:
        """How long a session may idle."""
        return self._limits.session_ttl_s

    @property
    def graph_bytes(self) -> int:
        """Activations that wait for their BACKWARD."""
        return self._graphs.used_bytes

    def open_run(self, owner: str, opened: OpenRun) -> int:
        """Load or create a run at the newest step that both sides have; returns that step."""
        key = (owner, opened.run_id)
        if key in self._runs:
            self._close_run(key)
        self._drop_unused_adapters()
        self._make_room_for_run(owner)
        settings = parse_settings(AdapterSettings, opened.adapter, "the run's adapter settings")
        if settings.rank > self._limits.max_adapter_rank:
            raise ConfigError(
                f"adapter.rank={settings.rank} exceeds {self._limits.max_adapter_rank}, this "
                "server's limit; choose a lower one"
            )
        adapter = attach(self._trunk, settings, self._new_name())
        try:
            self._runs[key] = TrainingRun(
                self._trunk,
                adapter,
                opened,
                self._new_store(owner, opened.run_id),
                self._graphs,
                self._limits.max_micro_batches,
            )
        except BaseException:
            adapter.remove()
            raise
        self._last_used_s[key] = self._clock()
        return self._runs[key].step

    def forward(self, owner: str, call: Forward, h_ND: Tensor) -> Tensor:
        """Trunk output [N, D] of a micro-batch, after finishing the step before if told to."""
        run = self._run(owner, call.run_id)
        rows = Rows(lengths=tuple(call.lengths))
        self._check_hidden(h_ND, rows)
        if call.commit is not None:
            run.commit(call.commit)
        if not call.is_evaluation:
            return run.forward(call.step, call.micro, h_ND, rows)
        if call.step != run.step:
            raise StepExpired(f"evaluation at step {call.step}, the server is at {run.step}")
        return run.evaluate(h_ND, rows)

    def backward(
        self, owner: str, call: Backward, grad_ND: Tensor
    ) -> tuple[Tensor | None, float | None]:
        """Gradient at the lower cut and squared norm, each where it was asked for."""
        run = self._run(owner, call.run_id)
        return run.backward(call.step, call.micro, grad_ND, call.is_last)

    def commit(self, owner: str, call: Commit) -> int:
        """Finish a step and save it if told to; the server's step now."""
        run = self._run(owner, call.run_id)
        if call.commit is not None:
            run.commit(call.commit)
        if call.save:
            run.require_at(call.step)
            run.save(call.pin)
        return run.step

    def pull_adapter(self, owner: str, run_id: str, step: int) -> AdapterState:
        """The trunk adapter of a saved step of the owner's own run."""
        return load_adapter_state(self._existing_store(owner, run_id), step)

    def open_session(self, owner: str, call: OpenSession) -> Session:
        """Reserve KV cache and load the adapter that the session wants."""
        self._drop_unused_adapters()
        name = None
        if call.run_id is not None:
            name = self._generation_adapter(owner, call.run_id, call.step)
        return self.sessions.open(owner, call.max_lengths, name, self._clock())

    def decode(self, owner: str, call: Decode, h_ND: Tensor) -> Tensor:
        """Trunk output [N, D] of new tokens of some rows of a session."""
        session = self.sessions.get(owner, call.session_id, self._clock())
        caches = session.rows_at(call.rows, call.lengths, call.positions)
        rows = Rows(lengths=tuple(call.lengths), starts=tuple(call.positions))
        self._check_hidden(h_ND, rows)
        with torch.inference_mode():
            y_ND: Tensor
            if session.adapter_name is None:
                with base_only(self._trunk):
                    y_ND = self._trunk(h_ND, rows, caches)
            else:
                self._generation_adapters[session.adapter_name].activate()
                y_ND = self._trunk(h_ND, rows, caches)
        return y_ND

    def close_session(self, owner: str, session_id: str) -> int:
        """Give the cache back; how many bytes."""
        return self.sessions.close(owner, session_id, self._clock())

    def _run(self, owner: str, run_id: str) -> TrainingRun:
        run = self._runs.get((owner, run_id))
        if run is None:
            raise StepExpired(f"run {run_id} is not open here; open it again")
        self._last_used_s[owner, run_id] = self._clock()
        return run

    def _check_hidden(self, h_ND: Tensor, rows: Rows) -> None:
        expected = (rows.num_tokens, self._trunk.hidden_size)
        if tuple(h_ND.shape) != expected:
            raise ProtocolError(f"tensor of shape {tuple(h_ND.shape)}, the rows need {expected}")

    def _new_store(self, owner: str, run_id: str) -> StepStore:
        folder = run_folder(self._folder, owner, run_id)
        limit = self._limits.max_client_stored_runs
        if not folder.exists() and folder.parent.is_dir():
            num_stored = sum(1 for _ in folder.parent.iterdir())
            if num_stored >= limit:
                raise PermissionRefused(
                    f"{owner} has {num_stored} runs stored here, its limit; ask the operator to "
                    "delete old ones"
                )
        return StepStore(folder, self._vault)

    def _existing_store(self, owner: str, run_id: str) -> StepStore:
        folder = run_folder(self._folder, owner, run_id)
        if not folder.is_dir():
            raise StepExpired(f"the server has no run {run_id} of {owner}; train it first")
        return StepStore(folder, self._vault)

    def _generation_adapter(self, owner: str, run_id: str, step: int | None) -> str:
        store = self._existing_store(owner, run_id)
        steps = store.steps()
        if step is None and steps:
            step = steps[-1]
        if step not in steps:
            raise StepExpired(f"run {run_id} has steps {steps} at the server, not {step}")
        key = f"{owner}/{run_id}@{step}"
        if key not in self._generation_adapters:
            settings = parse_settings(AdapterSettings, saved_settings(store, step), key)
            state = load_adapter_state(store, step)
            adapter = attach(self._trunk, settings, self._new_name())
            try:
                adapter.load(state)
            except BaseException:
                adapter.remove()
                raise
            self._generation_adapters[key] = adapter
        return key

    def _drop_unused_adapters(self) -> None:
        self.sessions.expire(self._clock())
        for key in set(self._generation_adapters) - self.sessions.adapters_in_use():
            self._generation_adapters.pop(key).remove()

    def _make_room_for_run(self, owner: str) -> None:
        """Unload idle runs, and the owner's least recently used ones beyond its limit.

        Nothing is lost: a run that comes back is loaded from its last saved step.
        """
        now_s = self._clock()
        by_age = sorted(self._last_used_s, key=lambda key: self._last_used_s[key])
        own = [key for key in by_age if key[0] == owner]
        idle = [k for k in by_age if now_s - self._last_used_s[k] > self._limits.run_ttl_s]
        surplus = max(0, len(own) - self._limits.max_client_runs + 1)
        for key in {*idle, *own[:surplus]}:
            self._close_run(key)

    def _close_run(self, key: tuple[str, str]) -> None:
        self._runs.pop(key).close()
        del self._last_used_s[key]

    def _new_name(self) -> str:
        return f"adapter{next(self._names)}"
