"""Generation sessions: what the server keeps of a client between two tokens, which is trunk KV.

It does not compute, count bytes (`kv_pool`), read frames or know adapters' weights. Time is passed
in as `now_s`.
"""

import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field

from cutlayer.errors import CacheFull, ProtocolError, SessionLost
from cutlayer.model.kv_cache import RowCache
from cutlayer.server.kv_pool import KvPool, PooledRow, PoolLimits

__all__ = ["Passage", "RowCall", "Session", "SessionLimits", "SessionTable"]


@dataclass(frozen=True, kw_only=True)
class SessionLimits:
    """What all sessions, and those of one client, may hold."""

    max_cache_bytes: int
    """KV bytes of all sessions together."""
    max_client_cache_bytes: int
    """KV bytes of one client's sessions."""
    max_client_sessions: int
    """Open sessions of one client."""
    max_client_adapters: int = 8
    """Saved steps whose adapters one client's sessions use at once."""
    max_session_rows: int
    """Rows of one session are numbered below this."""
    ttl_s: float
    """An idle session is forgotten after this."""
    evict_after_s: float
    """A row that idled for so long loses its cache where another needs the room."""

    def pool_limits(self) -> PoolLimits:
        """The part that counts bytes."""
        return PoolLimits(
            max_bytes=self.max_cache_bytes,
            max_client_bytes=self.max_client_cache_bytes,
            evict_after_s=self.evict_after_s,
        )


@dataclass(frozen=True, kw_only=True)
class RowCall:
    """New tokens for some rows of a session."""

    rows: Sequence[int]
    """Numbers, ascending."""
    lengths: Sequence[int]
    """New tokens of each."""
    positions: Sequence[int]
    """Tokens of each that are cached before."""
    max_lengths: Sequence[int] = ()
    """Limits of rows that are opened if they are not open; 0, or none at all, opens none."""

    def check(self) -> None:
        """Refuse what no client of ours sends.

        Raises:
            ProtocolError: numbers that do not fit together.
        """
        if not len(self.rows) == len(self.lengths) == len(self.positions):
            raise ProtocolError("rows, lengths and positions differ in number")
        if len(self.max_lengths) not in (0, len(self.rows)) or min(self.max_lengths, default=0) < 0:
            raise ProtocolError(f"{list(self.max_lengths)} are not max_lengths of these rows")
        if list(self.rows) != sorted(set(self.rows)):
            raise ProtocolError(f"rows {list(self.rows)} are not ascending")
        if min(self.lengths, default=0) < 1 or min(self.positions) < 0:
            raise ProtocolError("every row needs a token and a position from 0")


@dataclass(frozen=True, kw_only=True)
class Passage:
    """Where a session's rows pass through the trunk."""

    blocks: range
    """Global indices."""
    bytes_per_token: int
    """Of their cache."""


@dataclass
class Session:
    """Rows of one client under one adapter; each is a stream of its own."""

    session_id: str
    owner: str
    adapter_name: str | None
    """Name of the trunk adapter in the runner's table; None is the base model."""
    passage: "Passage"
    last_used_s: float
    rows: dict[int, PooledRow] = field(default_factory=dict)

    def caches(self, rows: Sequence[int]) -> list[RowCache]:
        """The caches of open rows."""
        return [self.rows[row].cache for row in rows]


class SessionTable:
    """Sessions by their names; rows come and go with calls, sessions when told or when idle."""

    def __init__(self, limits: SessionLimits, num_layers: int) -> None:
        """No session is open yet; `num_layers` are all blocks of the trunk."""
        self._limits = limits
        self._num_layers = num_layers
        self._pool = KvPool(limits.pool_limits())
        self._sessions: dict[str, Session] = {}

    def open(
        self,
        owner: str,
        max_lengths: Sequence[int],
        adapter_name: str | None,
        passage: Passage,
        now_s: float,
    ) -> Session:
        """A session with rows 0, 1, ... of at most `max_lengths` tokens, or without rows.

        Raises:
            CacheFull: the client has too many sessions.
            ProtocolError: a length below 1, or too many rows.
        """
        if min(max_lengths, default=1) < 1:
            raise ProtocolError(f"rows have at least one token, got {list(max_lengths)}")
        _check_numbers(range(len(max_lengths)), self._limits.max_session_rows)
        self.expire(now_s)
        num_own = sum(session.owner == owner for session in self._sessions.values())
        if num_own >= self._limits.max_client_sessions:
            raise CacheFull(f"{owner} has {num_own} sessions open, its limit; close one")
        session = Session(
            session_id=secrets.token_hex(16),
            owner=owner,
            adapter_name=adapter_name,
            passage=passage,
            last_used_s=now_s,
        )
        for row, max_length in enumerate(max_lengths):
            session.rows[row] = self._new_row(session, max_length, now_s)
        self._sessions[session.session_id] = session
        return session

    def get(self, owner: str, session_id: str, now_s: float) -> Session:
        """An open session of this client.

        Raises:
            SessionLost: expired, closed, never opened, or another client's: all look the same.
        """
        self.expire(now_s)
        session = self._sessions.get(session_id)
        if session is None or session.owner != owner:
            raise SessionLost("no such session here; open one and replay what was released")
        session.last_used_s = now_s
        return session

    def admit(self, owner: str, session_id: str, call: RowCall, now_s: float) -> Session:
        """Open the call's rows, make room for its tokens, cut its rows back to its positions.

        All of it or nothing. The rows are busy until `settle`.

        Raises:
            SessionLost: the session, or `lost_rows` of it; the client replays them.
            CacheFull: no room now; says when to ask again, if that can help.
            ProtocolError: a row would grow past its limit, or the call contradicts itself.
        """
        call.check()
        _check_numbers(call.rows, self._limits.max_session_rows)
        session = self.get(owner, session_id, now_s)
        rows = self._rows_of(session, call, now_s)
        ends = [p + n for p, n in zip(call.positions, call.lengths, strict=True)]
        for number, row, end in zip(call.rows, rows, ends, strict=True):
            if end > row.max_length:
                raise ProtocolError(
                    f"row {number} would have {end} tokens of {row.max_length}; "
                    "open it with a larger limit"
                )
        self._pool.admit(owner, dict(zip(rows, ends, strict=True)), now_s)
        for number, row, position in zip(call.rows, rows, call.positions, strict=True):
            session.rows[number] = row
            row.cache.truncate(position)
        return session

    def settle(self, owner: str, session_id: str, rows: Sequence[int], now_s: float) -> None:
        """A call has ended, well or not; its rows are idle from now on."""
        session = self._sessions.get(session_id)
        if session is not None and session.owner == owner:
            session.last_used_s = now_s
            found = [session.rows[row] for row in rows if row in session.rows]
            self._pool.settle(found, now_s)

    def close(self, owner: str, session_id: str, now_s: float, rows: Sequence[int] = ()) -> int:
        """Forget some rows, or the session with all of them; how many bytes came back.

        Raises:
            SessionLost: no such session.
        """
        session = self.get(owner, session_id, now_s)
        if not rows:
            return self._forget(session)
        closed = [session.rows.pop(row) for row in rows if row in session.rows]
        return sum(self._pool.empty(row) for row in closed)

    def expire(self, now_s: float) -> int:
        """Forget sessions that idled longer than their time to live; how many."""
        idle = [
            session
            for session in self._sessions.values()
            if now_s - session.last_used_s > self._limits.ttl_s
            and not any(row.is_busy for row in session.rows.values())
        ]
        for session in idle:
            self._forget(session)
        return len(idle)

    def adapters_in_use(self) -> set[str]:
        """Adapter names that an open session needs."""
        return {s.adapter_name for s in self._sessions.values() if s.adapter_name is not None}

    @property
    def num_sessions(self) -> int:
        """Open sessions."""
        return len(self._sessions)

    @property
    def num_rows(self) -> int:
        """Open rows of all sessions."""
        return sum(len(session.rows) for session in list(self._sessions.values()))

    @property
    def num_evictions(self) -> int:
        """Rows that lost their cache to others since the start."""
        return self._pool.num_evictions

    @property
    def cache_bytes(self) -> int:
        """KV bytes of all sessions: allocated, or promised to a call under way."""
        return self._pool.used_bytes

    def _rows_of(self, session: Session, call: RowCall, now_s: float) -> list[PooledRow]:
        """The call's rows, new ones where it opens some, which are not the session's yet."""
        limits = call.max_lengths or [0] * len(call.rows)
        found: list[PooledRow] = []
        lost: list[int] = []
        for number, position, limit in zip(call.rows, call.positions, limits, strict=True):
            row = session.rows.get(number)
            if row is None and limit:
                row = self._new_row(session, limit, now_s)
            if row is None or position > row.cache.length:
                lost.append(number)
            else:
                found.append(row)
        if lost:
            error = SessionLost(f"rows {lost} are not cached up to their positions; replay them")
            error.lost_rows = tuple(lost)
            raise error
        for row, position, limit in zip(found, call.positions, limits, strict=True):
            if position == 0 and limit > row.max_length:
                # Closed and opened again by a client that never heard of the closing.
                self._pool.empty(row, limit)
        return found

    def _new_row(self, session: Session, max_length: int, now_s: float) -> PooledRow:
        token_bytes = session.passage.bytes_per_token
        return PooledRow(session.owner, self._num_layers, token_bytes, max_length, now_s)

    def _forget(self, session: Session) -> int:
        del self._sessions[session.session_id]
        return sum(self._pool.empty(row) for row in session.rows.values())


def _check_numbers(rows: Sequence[int], max_rows: int) -> None:
    if rows and not (rows[0] >= 0 and rows[-1] < max_rows):
        raise ProtocolError(
            f"rows {rows[0]} to {rows[-1]} of a session; this server takes 0 to {max_rows - 1} "
            "(limits.max_session_rows)"
        )
