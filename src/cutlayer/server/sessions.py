"""Generation sessions: what the server keeps of a client between two tokens, which is trunk KV.

It does not compute, read frames or know adapters' weights. Time is passed in as `now_s`.
"""

import secrets
from collections.abc import Sequence
from dataclasses import dataclass

from cutlayer.errors import CacheFull, ProtocolError, SessionLost
from cutlayer.model.kv_cache import RowCache

__all__ = ["Session", "SessionLimits", "SessionTable"]


@dataclass(frozen=True, kw_only=True)
class SessionLimits:
    """What all sessions, and those of one client, may hold."""

    max_cache_bytes: int
    """KV bytes of all sessions together, counted at their reserved lengths."""
    max_client_cache_bytes: int
    """KV bytes of one client's sessions."""
    max_client_sessions: int
    """Open sessions of one client."""
    ttl_s: float
    """An idle session is forgotten after this."""


@dataclass
class Session:
    """One generation stream of one client."""

    session_id: str
    owner: str
    adapter_name: str | None
    """Name of the trunk adapter in the runner's table; None is the base model."""
    max_lengths: tuple[int, ...]
    caches: list[RowCache]
    reserved_bytes: int
    last_used_s: float

    def rows_at(
        self, rows: Sequence[int], lengths: Sequence[int], positions: Sequence[int]
    ) -> list[RowCache]:
        """The caches of some rows, cut back to the given positions.

        Raises:
            ProtocolError: no such row, or it would grow past its limit.
            SessionLost: a position behind what is cached; the client must replay.
        """
        self._check_call(rows, lengths, positions)
        for row, length, position in zip(rows, lengths, positions, strict=True):
            if position > self.caches[row].length:
                raise SessionLost(
                    f"row {row} has {self.caches[row].length} tokens cached, not {position}"
                )
            if position + length > self.max_lengths[row]:
                raise ProtocolError(
                    f"row {row} would have {position + length} tokens of {self.max_lengths[row]}; "
                    "open the session with a larger limit"
                )
        for row, position in zip(rows, positions, strict=True):
            self.caches[row].truncate(position)
        return [self.caches[row] for row in rows]

    def _check_call(
        self, rows: Sequence[int], lengths: Sequence[int], positions: Sequence[int]
    ) -> None:
        if not len(rows) == len(lengths) == len(positions):
            raise ProtocolError("rows, lengths and positions differ in number")
        if list(rows) != sorted(set(rows)) or not all(0 <= r < len(self.caches) for r in rows):
            raise ProtocolError(f"rows {list(rows)} are not rows of {len(self.caches)}, ascending")
        if min(lengths, default=0) < 1 or min(positions) < 0:
            raise ProtocolError("every row needs a token and a position from 0")


class SessionTable:
    """Admission by reserved bytes, eviction by idle time."""

    def __init__(self, limits: SessionLimits, bytes_per_token: int, num_layers: int) -> None:
        self._limits = limits
        self._bytes_per_token = bytes_per_token
        self._num_layers = num_layers
        self._sessions: dict[str, Session] = {}

    def open(
        self, owner: str, max_lengths: Sequence[int], adapter_name: str | None, now_s: float
    ) -> Session:
        """Reserve caches for rows of at most `max_lengths` tokens.

        Raises:
            CacheFull: no bytes or no session left; says for whom and when to ask again.
            ProtocolError: no row, or a length below 1.
        """
        if not max_lengths or min(max_lengths) < 1:
            raise ProtocolError(f"a session needs rows of at least one token, got {max_lengths}")
        reserved_bytes = sum(max_lengths) * self._bytes_per_token
        self.expire(now_s)
        self._admit(owner, reserved_bytes)
        session = Session(
            session_id=secrets.token_hex(16),
            owner=owner,
            adapter_name=adapter_name,
            max_lengths=tuple(max_lengths),
            caches=[RowCache(self._num_layers, length) for length in max_lengths],
            reserved_bytes=reserved_bytes,
            last_used_s=now_s,
        )
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

    def close(self, owner: str, session_id: str, now_s: float) -> int:
        """Forget a session; the bytes that were reserved for it."""
        session = self.get(owner, session_id, now_s)
        del self._sessions[session_id]
        return session.reserved_bytes

    def expire(self, now_s: float) -> int:
        """Forget sessions that idled longer than their time to live; how many."""
        idle = [
            session.session_id
            for session in self._sessions.values()
            if now_s - session.last_used_s > self._limits.ttl_s
        ]
        for session_id in idle:
            del self._sessions[session_id]
        return len(idle)

    def adapters_in_use(self) -> set[str]:
        """Adapter names that an open session needs."""
        return {s.adapter_name for s in self._sessions.values() if s.adapter_name is not None}

    @property
    def num_sessions(self) -> int:
        """Open sessions."""
        return len(self._sessions)

    @property
    def reserved_bytes(self) -> int:
        """KV bytes reserved by all open sessions."""
        return sum(session.reserved_bytes for session in list(self._sessions.values()))

    def _admit(self, owner: str, wanted_bytes: int) -> None:
        own = [session for session in self._sessions.values() if session.owner == owner]
        own_bytes = sum(session.reserved_bytes for session in own)
        limits = self._limits
        if len(own) >= limits.max_client_sessions:
            raise CacheFull(f"{owner} has {len(own)} sessions open, its limit; close one")
        if own_bytes + wanted_bytes > limits.max_client_cache_bytes:
            raise CacheFull(
                f"{wanted_bytes} KV bytes wanted, {limits.max_client_cache_bytes - own_bytes} of "
                f"{owner}'s quota left; ask for shorter rows or close a session"
            )
        if self.reserved_bytes + wanted_bytes > limits.max_cache_bytes:
            raise CacheFull(
                f"{wanted_bytes} KV bytes wanted, "
                f"{limits.max_cache_bytes - self.reserved_bytes} left; ask again later"
            )
