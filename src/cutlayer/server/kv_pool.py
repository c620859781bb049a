"""Bytes of all trunk caches: who gets room, whose idle rows go to make it, what is really held.

It does not know sessions, frames or what is computed. Bytes are those of allocated blocks, never
of what a row might become. Time is passed in as `now_s`; only the runner's thread calls it.
"""

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from cutlayer.errors import CacheFull
from cutlayer.model.kv_cache import RowCache, capacity_for

__all__ = ["KvPool", "PoolLimits", "PooledRow"]

_LEAST_RETRY_S = 0.05


@dataclass(frozen=True, kw_only=True)
class PoolLimits:
    """What all caches, and those of one client, may take."""

    max_bytes: int
    max_client_bytes: int
    evict_after_s: float
    """A row that idled for so long may be dropped where somebody needs its room."""


class PooledRow:
    """One row's cache and what the pool knows of it; the pool alone changes it.

    Attributes:
        owner: the client's name.
        bytes_per_token: of one token over the blocks that the row takes.
        max_length: tokens that it may ever hold.
        cache: its keys and values; another object after an eviction.
        num_bytes: what it counts as: its allocated bytes, or while it is busy those to come.
        last_used_s: end of its last call.
        is_busy: a call with it is under way.
    """

    def __init__(
        self, owner: str, num_layers: int, bytes_per_token: int, max_length: int, now_s: float
    ) -> None:
        self.owner = owner
        self.bytes_per_token = bytes_per_token
        self.max_length = max_length
        self.cache = RowCache(num_layers, max_length)
        self.num_bytes = 0
        self.last_used_s = now_s
        self.is_busy = False


class KvPool:
    """A budget of bytes, and the rows that hold some."""

    def __init__(self, limits: PoolLimits) -> None:
        """No row holds anything yet."""
        self.num_evictions = 0
        self._limits = limits
        self._rows: set[PooledRow] = set()
        self._client_bytes: Counter[str] = Counter()

    @property
    def used_bytes(self) -> int:
        """What all rows count as."""
        return sum(list(self._client_bytes.values()))

    def client_bytes(self, owner: str) -> int:
        """What one client's rows count as."""
        return self._client_bytes[owner]

    def admit(self, owner: str, lengths: Mapping[PooledRow, int], now_s: float) -> None:
        """Make room for one call's rows to hold so many tokens; they are busy until `settle`.

        Args:
            owner: whose call it is.
            lengths: tokens that each row of the call will hold.
            now_s: the time.

        Raises:
            CacheFull: no room even without all rows that may go; nothing has changed.
        """
        goals = {row: self._bytes_of(row, length) for row, length in lengths.items()}
        wanted = sum(goal - row.num_bytes for row, goal in goals.items())
        for victim in self._victims(owner, wanted, goals, now_s):
            self.num_evictions += 1
            self.empty(victim)
        for row, goal in goals.items():
            self._count(row, goal)
            row.is_busy = True
            row.last_used_s = now_s

    def settle(self, rows: Iterable[PooledRow], now_s: float) -> None:
        """A call has ended, well or not: its rows count as what they hold."""
        for row in rows:
            if row in self._rows:
                self._count(row, row.cache.nbytes)
            row.is_busy = False
            row.last_used_s = now_s

    def empty(self, row: PooledRow, max_length: int | None = None) -> int:
        """Free a row's memory and forget its tokens; how many bytes came back.

        Args:
            row: not busy.
            max_length: its new limit; None keeps the old one.
        """
        num_bytes = row.num_bytes
        row.max_length = row.max_length if max_length is None else max_length
        # Another object: processes that share the trunk drop theirs when the leader's is gone.
        row.cache = RowCache(row.cache.num_layers, row.max_length)
        self._count(row, 0)
        return num_bytes

    def _bytes_of(self, row: PooledRow, length: int) -> int:
        capacity = capacity_for(length, row.max_length)
        return max(row.num_bytes, capacity * row.bytes_per_token)

    def _count(self, row: PooledRow, num_bytes: int) -> None:
        self._client_bytes[row.owner] += num_bytes - row.num_bytes
        if not self._client_bytes[row.owner]:
            del self._client_bytes[row.owner]
        row.num_bytes = num_bytes
        if num_bytes:
            self._rows.add(row)
        else:
            self._rows.discard(row)

    def _victims(
        self, owner: str, wanted: int, goals: Mapping[PooledRow, int], now_s: float
    ) -> list[PooledRow]:
        """The rows that have to go, least recently used first of who holds most."""
        limits = self._limits
        own_over = self._client_bytes[owner] + wanted - limits.max_client_bytes
        over = self.used_bytes + wanted - limits.max_bytes
        if own_over <= 0 and over <= 0:
            return []
        others = [row for row in self._rows if not row.is_busy and row not in goals]
        idle = [row for row in others if now_s - row.last_used_s >= limits.evict_after_s]
        chosen = _enough([row for row in idle if row.owner == owner], own_over)
        freed = sum(row.num_bytes for row in chosen)
        held = self._client_bytes - Counter({owner: freed})
        left: dict[str, list[PooledRow]] = {}
        for row in sorted(set(idle) - set(chosen), key=_age, reverse=True):
            left.setdefault(row.owner, []).append(row)
        while over > freed and left:
            most = max(left, key=lambda name: (held[name], name))
            # Oldest last: one client may hold tens of thousands of rows.
            victim = left[most].pop()
            if not left[most]:
                del left[most]
            chosen.append(victim)
            held[most] -= victim.num_bytes
            freed += victim.num_bytes
        own_freed = sum(row.num_bytes for row in chosen if row.owner == owner)
        if own_freed < own_over or freed < over:
            raise self._full(owner, sum(goals.values()), others, now_s)
        return chosen

    def _full(
        self, owner: str, call_bytes: int, others: Iterable[PooledRow], now_s: float
    ) -> CacheFull:
        limits = self._limits
        most = min(limits.max_client_bytes, limits.max_bytes)
        if call_bytes > most:
            return CacheFull(
                f"the rows of this call need {call_bytes} KV bytes, {owner} may have {most}; "
                "send fewer rows at once or shorter ones"
            )
        waits_s = (row.last_used_s + limits.evict_after_s - now_s for row in others)
        soonest_s = min((wait_s for wait_s in waits_s if wait_s > 0), default=math.inf)
        # What others hold is no business of this client.
        error = CacheFull(
            f"no room for rows of {call_bytes} KV bytes ({owner} holds "
            f"{self._client_bytes[owner]} of {limits.max_client_bytes}), and no other row is idle; "
            "close rows or wait"
        )
        error.retry_after_s = max(_LEAST_RETRY_S, min(soonest_s, limits.evict_after_s))
        return error


def _enough(rows: Iterable[PooledRow], num_bytes: int) -> list[PooledRow]:
    """The oldest rows that free so many bytes, or all."""
    chosen: list[PooledRow] = []
    for row in sorted(rows, key=_age):
        if num_bytes <= 0:
            break
        chosen.append(row)
        num_bytes -= row.num_bytes
    return chosen


def _age(row: PooledRow) -> float:
    return row.last_used_s
