"""Front activations of owners' rows, kept across epochs within a byte budget.

It does not compute, read frames or know what trains. Whoever lost rows is told which, and sends
them again: nothing here is worth saving.

Shapes: L = tokens of one row, D = hidden size.
"""

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from pydantic import Field
from torch import Tensor

from cutlayer.errors import CacheFull, SessionLost
from cutlayer.settings import Settings

__all__ = ["HeldRow", "RowSet", "RowSettings", "RowStore"]

_GIB = 1 << 30
_BUSY_S = 60.0
"""A set that was used a moment ago belongs to a run that goes on."""
_ROW_BYTES, _PLACE_BYTES = 512, 72
"""What Python itself spends on a row, and on a place with its label."""


class RowSettings(Settings):
    """What the enclave keeps of rows, so that each is sent once."""

    max_bytes: int = Field(default=16 * _GIB, ge=1)
    """Activations of all owners together; set it to the memory that the enclave can spare."""
    max_client_bytes: int = Field(default=8 * _GIB, ge=1)
    """Activations of one owner."""
    ttl_s: float = Field(default=86_400.0, gt=0)
    """Rows that nobody used for so long are forgotten."""


@dataclass(frozen=True, kw_only=True)
class RowSet:
    """Which rows belong together: of one owner, one run, one front."""

    owner: str
    row_set: str
    front: str
    """Digest of the weights that made the activations."""


@dataclass(frozen=True, kw_only=True)
class HeldRow:
    """One row as the enclave has it."""

    h_LD: Tensor = field(repr=False)
    """Front output, on the CPU."""
    places: tuple[int, ...] = field(repr=False)
    """Places that predict a scored token."""
    targets: tuple[int, ...] | None = field(repr=False)
    """Those tokens; None where labels stay at the owner."""

    @property
    def num_bytes(self) -> int:
        """In memory, or many short rows would take more than anybody counts."""
        return self.h_LD.nbytes + _ROW_BYTES + _PLACE_BYTES * len(self.places)


@dataclass(kw_only=True)
class _Kept:
    rows: dict[int, HeldRow] = field(default_factory=dict)
    used_s: float

    @property
    def num_bytes(self) -> int:
        return sum(row.num_bytes for row in self.rows.values())


class RowStore:
    """Rows by set and id. Thread-safe: connections put, the runner's calls hold what they got."""

    def __init__(self, settings: RowSettings) -> None:
        """Empty."""
        self._settings = settings
        self._sets: dict[RowSet, _Kept] = {}
        self._lock = threading.Lock()
        self._used: dict[str, int] = {}

    @property
    def used_bytes(self) -> int:
        """Of all owners."""
        return sum(self._used.values())

    def held_bytes(self, owner: str) -> int:
        """Of one owner."""
        return self._used.get(owner, 0)

    def missing(self, name: RowSet, row_ids: Sequence[int], now_s: float) -> list[int]:
        """Those of the rows that are not here."""
        with self._lock:
            kept = self._touched(name, now_s)
            return [row for row in row_ids if kept is None or row not in kept.rows]

    def get(self, name: RowSet, row_ids: Sequence[int], now_s: float) -> list[HeldRow]:
        """The rows, in this order.

        Raises:
            SessionLost: some are not here; `lost_rows` are their ids, to be put again.
        """
        with self._lock:
            kept = self._touched(name, now_s)
            rows = {} if kept is None else kept.rows
            lost = tuple(row for row in row_ids if row not in rows)
            if not lost:
                return [rows[row] for row in row_ids]
        error = SessionLost(
            f"{len(lost)} of {len(row_ids)} rows are not in the enclave's memory: it restarted, "
            "or they made room for others; put them again"
        )
        error.lost_rows = lost
        raise error

    def put(self, name: RowSet, rows: Mapping[int, HeldRow], now_s: float) -> int:
        """Keep rows, in place of earlier ones with their ids; the owner's bytes now.

        Raises:
            CacheFull: no room, and what to do; nothing has changed.
        """
        with self._lock:
            # Connections may be open for days, and nobody else sweeps meanwhile.
            self._sweep(now_s)
            kept = self._sets.get(name, _Kept(used_s=now_s))
            before = sum(kept.rows[row].num_bytes for row in rows if row in kept.rows)
            added = sum(row.num_bytes for row in rows.values()) - before
            self._make_room(name, added, now_s)
            self._sets[name] = kept
            kept.rows.update(rows)
            kept.used_s = now_s
            self._used[name.owner] = self._used.get(name.owner, 0) + added
            return self._used[name.owner]

    def sweep(self, now_s: float) -> None:
        """Forget what nobody used for long; to be called now and then."""
        with self._lock:
            self._sweep(now_s)

    def clear(self) -> None:
        """Forget everything, as a restart does."""
        with self._lock:
            self._sets.clear()
            self._used.clear()

    def _sweep(self, now_s: float) -> None:
        for name, kept in list(self._sets.items()):
            if now_s - kept.used_s > self._settings.ttl_s:
                self._forget(name)

    def _touched(self, name: RowSet, now_s: float) -> _Kept | None:
        kept = self._sets.get(name)
        if kept is not None:
            kept.used_s = now_s
        return kept

    def _make_room(self, name: RowSet, added: int, now_s: float) -> None:
        """Forget the owner's other sets, oldest first, but for those of runs that go on."""
        settings, freed, chosen = self._settings, 0, []
        for other in sorted(self._sets, key=lambda other: self._sets[other].used_s):
            if self._fits(name.owner, added - freed):
                break
            is_idle = now_s - self._sets[other].used_s > _BUSY_S
            if other != name and other.owner == name.owner and is_idle:
                chosen.append(other)
                freed += self._sets[other].num_bytes
        if self._fits(name.owner, added - freed):
            for other in chosen:
                self._forget(other)
            return
        own, everybody = self.held_bytes(name.owner), self.used_bytes
        raise CacheFull(
            f"{added} bytes of rows do not fit beside the {own} that {name.owner} has here (limit "
            f"rows.max_client_bytes={settings.max_client_bytes}; all owners have {everybody} of "
            f"rows.max_bytes={settings.max_bytes}): raise the limit at the enclave, set "
            'connection.codec = "bf16", which halves rows, or train on fewer rows'
        )

    def _fits(self, owner: str, added: int) -> bool:
        settings = self._settings
        own_fits = self.held_bytes(owner) + added <= settings.max_client_bytes
        return own_fits and self.used_bytes + added <= settings.max_bytes

    def _forget(self, name: RowSet) -> None:
        self._used[name.owner] -= self._sets.pop(name).num_bytes
