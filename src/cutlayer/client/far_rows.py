"""Rows of generation at one far trunk: opened, lost, and given the very same bytes again.

It does not know tokens, noise or what comes before and after the trunk (`session`, `chain_rows`).

Shapes: N = vectors of all rows of a call, D = hidden size.
"""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

from cutlayer.client.link import PendingCall
from cutlayer.errors import CutlayerError, SessionLost, TransportError
from cutlayer.privacy.boundary import Released
from cutlayer.privacy.history import ReleasedHistory

__all__ = ["Answering", "FarCall", "FarRows", "SessionRows"]

_MAX_REPLAYS = 5


class Answering(Protocol):
    """Whoever answers for rows: the part of `remote_trunk.RemoteTrunk` that is needed here."""

    def open_session(self, max_lengths: Sequence[int], run_id: str | None, step: int | None) -> str:
        """The name of a new session."""

    def decode(
        self,
        released: Released,
        session_id: str,
        rows: Sequence[int],
        max_lengths: Sequence[int] = (),
    ) -> PendingCall:
        """Send vectors of some rows."""

    def check(
        self,
        released: Released,
        y_ND: Tensor,
        past: Sequence[ReleasedHistory],
        run_id: str | None,
        step: int | None,
    ) -> None:
        """Check a reply."""

    def close_rows(self, session_id: str, rows: Sequence[int]) -> None:
        """Give caches of rows back."""

    def close_session(self, session_id: str) -> None:
        """Give all caches back."""


@dataclass(kw_only=True)
class FarCall:
    """A call under way."""

    released: Released
    rows: tuple[int, ...]
    """Their numbers, ascending."""
    num_logits: tuple[int, ...]
    """Per row how many of its last tokens are wanted, for whoever answers with logits."""
    call: PendingCall
    session_id: str


class SessionRows(Protocol):
    """Rows of one session, wherever they are computed; used from one thread."""

    @property
    def num_replays(self) -> int:
        """Calls that sent lost rows again."""

    def open_row(self, row: int, max_length: int) -> ReleasedHistory:
        """Begin an empty row; what it releases first is kept in the history."""

    def begin_conversation(self, row: int, num_vectors: int) -> None:
        """From now on a new conversation pays for a row, also for what has been released."""

    def close_row(self, row: int) -> None:
        """Forget a row here and there."""

    def begin(self, released: Released, rows: Sequence[int], num_logits: Sequence[int]) -> FarCall:
        """Send what follows the rows' cached vectors."""

    def finish(self, call: FarCall) -> Tensor:
        """Wait for a call, lost rows sent again: [N, D]. Calls finish in their order."""

    def drop(self, call: FarCall) -> None:
        """Wait for a call whose answer is of no use."""

    def close(self) -> None:
        """Give all caches back."""


@dataclass(kw_only=True)
class _FarRow:
    max_length: int
    history: ReleasedHistory = field(default_factory=ReleasedHistory)
    is_open: bool = False
    """Whether the other side has opened it, as far as is known."""


class FarRows:
    """Implements `SessionRows` for one trunk."""

    def __init__(self, trunk: Answering, run_id: str | None, step: int | None) -> None:
        """Nothing is sent before the first call.

        Args:
            trunk: where the rows are.
            run_id: whose trunk adapter is used; None is the base model.
            step: which saved step of that run.
        """
        self._trunk = trunk
        self._run_id, self._step = run_id, step
        self._rows: dict[int, _FarRow] = {}
        self._session_id: str | None = None
        self._num_replays = 0

    @property
    def num_replays(self) -> int:
        """See `SessionRows`."""
        return self._num_replays

    def open_row(self, row: int, max_length: int) -> ReleasedHistory:
        """See `SessionRows`; the other side hears of it with its first vectors."""
        opened = self._rows[row] = _FarRow(max_length=max_length)
        return opened.history

    def begin_conversation(self, row: int, num_vectors: int) -> None:
        """Nothing: whoever holds the gate in front of this trunk counts."""

    def close_row(self, row: int) -> None:
        """See `SessionRows`."""
        closed = self._rows.pop(row)
        if closed.is_open and self._session_id is not None:
            # The other side's own time limit ends what it does not hear of.
            with suppress(CutlayerError):
                self._trunk.close_rows(self._session_id, [row])

    def begin(self, released: Released, rows: Sequence[int], num_logits: Sequence[int]) -> FarCall:
        """See `SessionRows`."""
        for index, row in enumerate(rows):
            self._rows[row].history.record(released, index)
        session_id = self._opened()
        sent = self._send(released, session_id, rows, num_logits)
        return FarCall(
            released=released,
            rows=tuple(rows),
            num_logits=tuple(num_logits),
            call=sent,
            session_id=session_id,
        )

    def finish(self, call: FarCall) -> Tensor:
        """See `SessionRows`.

        Raises:
            SessionLost: the rows were lost again and again.
            TransportError: the other side stayed away.
            PeerMisbehaved: an honest trunk would not have returned it.
        """
        try:
            y_ND = self._answer(call)
        except TransportError:
            # A connection that comes back may repeat old calls: not upon these rows.
            self._forget_session()
            raise
        past = [self._rows[row].history for row in call.rows]
        self._trunk.check(call.released, y_ND, past, self._run_id, self._step)
        for row in call.rows:
            self._rows[row].is_open = True
        return y_ND

    def drop(self, call: FarCall) -> None:
        """See `SessionRows`."""
        if self._session_id is not None:
            with suppress(CutlayerError):
                call.call.result()
        call.call.forget()

    def close(self) -> None:
        """See `SessionRows`."""
        session_id, self._session_id = self._session_id, None
        self._rows.clear()
        if session_id is not None:
            with suppress(CutlayerError):
                self._trunk.close_session(session_id)

    def _ask(
        self,
        released: Released,
        session_id: str,
        rows: Sequence[int],
        max_lengths: Sequence[int],
        num_logits: Sequence[int],
    ) -> PendingCall:
        return self._trunk.decode(released, session_id, rows, max_lengths)

    def _send(
        self, released: Released, session_id: str, rows: Sequence[int], num_logits: Sequence[int]
    ) -> PendingCall:
        return self._ask(released, session_id, rows, self._limits(rows), num_logits)

    def _opened(self) -> str:
        if self._session_id is None:
            self._session_id = self._trunk.open_session([], self._run_id, self._step)
        return self._session_id

    def _limits(self, numbers: Sequence[int]) -> list[int]:
        """Limits of rows that are to be opened; empty where all of them are open."""
        rows = [self._rows[number] for number in numbers]
        if all(row.is_open for row in rows):
            return []
        return [0 if row.is_open else row.max_length for row in rows]

    def _answer(self, call: FarCall) -> Tensor:
        lost: SessionLost | None = None
        for _ in range(1 + _MAX_REPLAYS):
            try:
                if lost is not None:
                    self._replay(call, lost.lost_rows)
                return call.call.tensor("y")
            except SessionLost as error:
                lost = error
        raise SessionLost(f"the server lost these rows {_MAX_REPLAYS} times in a row; try later")

    def _replay(self, call: FarCall, lost_rows: tuple[int, ...]) -> None:
        """Send the very bytes of the lost rows that were released before this call; then it."""
        if not lost_rows and call.session_id == self._session_id:
            self._forget_session()
        for row in call.rows:
            if not lost_rows or row in lost_rows:
                self._rows[row].is_open = False
        self._num_replays += 1
        # What follows may be lost with this session too.
        call.session_id = self._opened()
        for row, start in zip(call.rows, call.released.rows.starts, strict=True):
            state = self._rows[row]
            if start and not state.is_open:
                past = state.history.replay(start)
                self._send(past, self._opened(), [row], [0]).tensor("y")
                state.is_open = True
        call.call = self._send(call.released, call.session_id, call.rows, call.num_logits)

    def _forget_session(self) -> None:
        """The next call opens another one, and each row is replayed when it is next used."""
        self._session_id = None
        for row in self._rows.values():
            row.is_open = False
