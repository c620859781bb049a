"""The trunk and everything that lives on it: runs, sessions and their adapters.

One method per frame kind, plain values in and out. Only the runner thread calls it; it does not
know frames, codecs, certificates or rights.

Shapes: N = tokens of all rows of a call, D = hidden size.
"""

import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from cutlayer.errors import ProtocolError, StepExpired
from cutlayer.federation.trunk_pool import TrunkUpdate, UpdateKind
from cutlayer.model.adapters import Adapter, AdapterSettings, AdapterState, attach, base_only
from cutlayer.model.kv_cache import bytes_per_token
from cutlayer.model.partition import Trunk
from cutlayer.model.rows import Rows
from cutlayer.server.graphs import GraphBudget
from cutlayer.server.run_table import RunTable
from cutlayer.server.runs import load_adapter_state, saved_settings
from cutlayer.server.sessions import Session, SessionTable
from cutlayer.server.settings import LimitSettings
from cutlayer.settings import parse_settings
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
        self._clock = clock
        self._graphs = GraphBudget(limits.max_graph_bytes)
        self._table = RunTable(
            trunk, limits, state_folder, vault, self._graphs, self._new_name, clock
        )
        self._runs = self._table.runs
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
        self._drop_unused_adapters()
        return self._table.open(owner, opened).step

    def forward(self, owner: str, call: Forward, h_ND: Tensor) -> Tensor:
        """Trunk output [N, D] of a micro-batch, after finishing the step before if told to."""
        run = self._table.get(owner, call.run_id)
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
        run = self._table.get(owner, call.run_id)
        return run.backward(call.step, call.micro, grad_ND, call.is_last)

    def commit(self, owner: str, call: Commit) -> int:
        """Finish a step and save it if told to; the server's step now."""
        run = self._table.get(owner, call.run_id)
        if call.commit is not None:
            run.commit(call.commit)
        if call.save:
            run.require_at(call.step)
            run.save(call.pin)
        return run.step

    def adapter_layout(self, adapter: AdapterSettings) -> Mapping[str, list[int]]:
        """Key and shape of every tensor of the trunk's adapter."""
        return self._table.layout(adapter)

    def begin_round(
        self, run_id: str, adapter: AdapterSettings, states: Mapping[str, AdapterState]
    ) -> None:
        """Members' runs of this round start from these; called again, it adds members.

        Raises:
            ConfigError: the round has other adapter settings, or the rank exceeds the limit.
            ProtocolError: a state does not fit the trunk.
        """
        self._table.begin_round(run_id, adapter, states)

    def collect(
        self, run_id: str, members: Sequence[str], kind: UpdateKind
    ) -> Mapping[str, TrunkUpdate]:
        """What the members' runs of a round have learnt; who has nothing yet is absent."""
        return self._table.collect(run_id, members, kind)

    def end_round(self, run_id: str) -> None:
        """Forget a round and its runs."""
        self._table.end_round(run_id)

    def pull_adapter(self, owner: str, run_id: str, step: int) -> AdapterState:
        """The trunk adapter of a saved step of the owner's own run."""
        return load_adapter_state(self._table.store(owner, run_id), step)

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

    def _check_hidden(self, h_ND: Tensor, rows: Rows) -> None:
        expected = (rows.num_tokens, self._trunk.hidden_size)
        if tuple(h_ND.shape) != expected:
            raise ProtocolError(f"tensor of shape {tuple(h_ND.shape)}, the rows need {expected}")

    def _generation_adapter(self, owner: str, run_id: str, step: int | None) -> str:
        store = self._table.store(owner, run_id)
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

    def _new_name(self) -> str:
        return f"adapter{next(self._names)}"
