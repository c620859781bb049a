"""Generation at the server: sessions, the adapters that they use, and decodes piece by piece.

Only the runner thread calls it. It does not compute (`engine`), count bytes (`kv_pool`) nor choose
who shares a call (`scheduler`).

Shapes: N = tokens of all rows of a call, D = hidden size.
"""

import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from cutlayer.errors import CacheFull, ProtocolError, StepExpired
from cutlayer.model.adapter_slots import slots_of
from cutlayer.model.adapters import Adapter, AdapterSettings, attach
from cutlayer.model.cut import Cut
from cutlayer.model.kv_cache import bytes_per_token
from cutlayer.model.partition import Trunk
from cutlayer.model.rows import Rows
from cutlayer.server.batches import FAILURES, Failure, TrunkCall, TrunkResult, together
from cutlayer.server.engine import Inference, TrunkEngine
from cutlayer.server.run_files import check_cut, load_saved_adapter
from cutlayer.server.run_table import RunTable
from cutlayer.server.sessions import Passage, RowCall, Session, SessionLimits, SessionTable
from cutlayer.settings import parse_settings
from cutlayer.wire.messages import CloseSession, Decode, OpenSession

__all__ = ["Generation", "check_hidden"]


@dataclass(frozen=True, kw_only=True)
class _Loaded:
    """The adapter of a saved step, on the trunk."""

    adapter: Adapter
    cut: Cut


class Generation:
    """All state that DECODE calls share."""

    def __init__(
        self,
        trunk: Trunk,
        engine: TrunkEngine,
        table: RunTable,
        limits: SessionLimits,
        new_name: Callable[[], str],
        clock: Callable[[], float],
        observe: Callable[[int, float, float], None],
    ) -> None:
        """Args:
        trunk: what computes.
        engine: calls it.
        table: training runs, whose saved adapters sessions may use.
        limits: what sessions may hold.
        new_name: gives an adapter a name of its own.
        clock: seconds, for idle times.
        observe: told tokens, seconds and processor seconds of this thread, of every joint decode.
        """
        self._trunk = trunk
        self._engine = engine
        self._table = table
        self._new_name = new_name
        self._clock = clock
        self._max_adapters = limits.max_client_adapters
        self._observe = observe
        self._adapters: dict[str, _Loaded] = {}
        self._passages: dict[range, Passage] = {}
        self.sessions = SessionTable(limits, len(trunk.block_range))

    def open(self, owner: str, call: OpenSession, cut: Cut) -> Session:
        """A new session; loads the adapter that it wants."""
        self.sweep()
        name = None
        if call.run_id is not None:
            name = self._adapter(owner, call.run_id, call.step, cut)
        passage = self._passage(cut.trunk)
        return self.sessions.open(owner, call.max_lengths, name, passage, self._clock())

    def close(self, owner: str, call: CloseSession) -> int:
        """Close rows or a session; how many bytes came back."""
        return self.sessions.close(owner, call.session_id, self._clock(), call.rows)

    def decode(self, calls: Sequence[TrunkCall]) -> list[TrunkResult | Failure]:
        """One piece of each call in one call of the trunk; rows are admitted with the first."""
        began_s, began_cpu_s = time.perf_counter(), time.thread_time()
        results = together(calls, self._begin, self._engine.infer, self._end)
        answered = zip(calls, results, strict=True)
        num_tokens = sum(len(c.piece) for c, r in answered if isinstance(r, TrunkResult))
        seconds, cpu_s = time.perf_counter() - began_s, time.thread_time() - began_cpu_s
        self._observe(num_tokens, seconds, cpu_s)
        return results

    def abandon(self, owner: str, header: Decode) -> None:
        """A call ended between two of its pieces; what it has cached stays, its rows are idle."""
        self.sessions.settle(owner, header.session_id, header.rows, self._clock())

    def sweep(self) -> None:
        """Forget what idled too long, and adapters that nobody uses."""
        self.sessions.expire(self._clock())
        for key in set(self._adapters) - self.sessions.adapters_in_use():
            self._adapters.pop(key).adapter.remove()

    def _begin(self, call: TrunkCall) -> Inference:
        header = call.header
        assert isinstance(header, Decode)
        if call.begin:
            session = self.sessions.get(call.owner, header.session_id, self._clock())
        else:
            session = self._admit(call, header)
        indices, rows = _part(header.lengths, header.positions, call.piece)
        return Inference(
            adapter=self._name(session),
            h_ND=call.tensor[call.piece.start : call.piece.stop],
            rows=rows,
            blocks=session.passage.blocks,
            caches=session.caches([header.rows[index] for index in indices]),
        )

    def _name(self, session: Session) -> str | None:
        """The trunk's name of the session's adapter."""
        key = session.adapter_name
        return None if key is None else self._adapters[key].adapter.name

    def _admit(self, call: TrunkCall, header: Decode) -> Session:
        row_call = RowCall(
            rows=header.rows,
            lengths=header.lengths,
            positions=header.positions,
            max_lengths=header.max_lengths,
        )
        row_call.check()
        rows = Rows(lengths=tuple(header.lengths), starts=tuple(header.positions))
        session = self.sessions.get(call.owner, header.session_id, self._clock())
        check_hidden(self._trunk, call.tensor, rows, self._name(session))
        return self.sessions.admit(call.owner, header.session_id, row_call, self._clock())

    def _end(self, call: TrunkCall, begun: Inference, found: Tensor | Failure) -> TrunkResult:
        is_failure = isinstance(found, FAILURES)
        if is_failure or call.is_last:
            assert isinstance(call.header, Decode)
            self.abandon(call.owner, call.header)
        if isinstance(found, FAILURES):
            raise found
        return TrunkResult(tensor=found)

    def _passage(self, blocks: range) -> Passage:
        if blocks not in self._passages:
            # Not a parameter's: that of quantised weights is no type of keys.
            dtype = self._trunk.zeros_ND(0).dtype
            token_bytes = bytes_per_token(self._trunk, dtype, blocks)
            self._passages[blocks] = Passage(blocks=blocks, bytes_per_token=token_bytes)
        return self._passages[blocks]

    def _adapter(self, owner: str, run_id: str, step: int | None, cut: Cut) -> str:
        store = self._table.store(owner, run_id)
        steps = store.steps()
        if step is None and steps:
            step = steps[-1]
        if step not in steps:
            raise StepExpired(f"run {run_id} has steps {steps} at the server, not {step}")
        key = f"{owner}/{run_id}@{step}"
        if key in self._adapters:
            check_cut(run_id, self._adapters[key].cut, cut)
            return key
        self._require_room(owner)
        saved = load_saved_adapter(store, step)
        check_cut(run_id, saved.cut, cut)
        settings = parse_settings(AdapterSettings, saved.settings, key)
        adapter = attach(self._trunk, settings, self._new_name(), cut.trunk)
        try:
            adapter.load(saved.state)
        except BaseException:
            adapter.remove()
            raise
        self._adapters[key] = _Loaded(adapter=adapter, cut=cut)
        return key

    def _require_room(self, owner: str) -> None:
        num_own = sum(key.startswith(f"{owner}/") for key in self._adapters)
        if num_own >= self._max_adapters:
            raise CacheFull(
                f"sessions of {owner} use {num_own} adapters, its limit "
                "(limits.max_client_adapters); close those of another run or step"
            )


def check_hidden(trunk: Trunk, h_ND: Tensor, rows: Rows, adapter: str | None) -> None:
    """Refuse hidden states that do not fit their rows, before others share their call.

    Args:
        trunk: what is called.
        h_ND: what came.
        rows: their layout.
        adapter: name of the rows' adapter, whose prefix takes positions too.

    Raises:
        ProtocolError: another shape.
        DataError: a row is longer than the model's context.
    """
    expected = (rows.num_tokens, trunk.hidden_size)
    if tuple(h_ND.shape) != expected:
        raise ProtocolError(f"tensor of shape {tuple(h_ND.shape)}, the rows need {expected}")
    num_before = 0 if adapter is None else slots_of(trunk).settings[adapter].num_positions
    # In the call it would fail for all, and be done again one by one.
    trunk.check_context(rows, num_before)


def _part(lengths: Sequence[int], positions: Sequence[int], piece: range) -> tuple[list[int], Rows]:
    """Which rows a piece of the N tokens touches, and its own layout."""
    indices: list[int] = []
    part_lengths: list[int] = []
    starts: list[int] = []
    ends = itertools.accumulate(lengths)
    for index, (length, end) in enumerate(zip(lengths, ends, strict=True)):
        first = max(piece.start, end - length)
        last = min(piece.stop, end)
        if first < last:
            indices.append(index)
            part_lengths.append(last - first)
            starts.append(positions[index] + first - (end - length))
    return indices, Rows(lengths=tuple(part_lengths), starts=tuple(starts))
