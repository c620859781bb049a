"""The list of everything that left: one durable line per release, before its frame leaves.

It does not decide what may leave nor add noise (`boundary`), and holds no content: a line names
its rows by keyed digests that nobody without the run secret can connect to a row or compare with a
guess. A release whose rows are all in the ledger already is a replay: the same bytes leave again,
nobody learns more, and no line is written. Lines are never changed, removed or rolled back; a
crash between the line and the frame leaves a release counted that may never have left.
"""

import threading
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from types import TracebackType

import msgspec

from cutlayer.errors import StorageError
from cutlayer.privacy.budget import SessionBudget, check_day, check_sessions
from cutlayer.privacy.mechanism import PrivacyEvent
from cutlayer.storage.log import DurableLog

__all__ = ["Ledger", "LedgerLine", "LedgerSummary", "Release"]


class LedgerLine(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One line of the file."""

    time: str
    """When, ISO 8601 in UTC."""
    run: str
    """Run identifier."""
    boundary: str
    """Which gate: activations, gradients or generation."""
    mechanism: str
    """Noise rule."""
    scale: float | None
    """Its scale; null where it has none."""
    version: str
    """Weights that made the vectors."""
    keys: list[str]
    """One release key per row, 32 hex digits."""
    vectors: int
    """Vectors released for these rows; replayed rows of the same frame are not in the line."""


@dataclass(frozen=True, kw_only=True)
class Release:
    """One row that is about to leave."""

    key: str
    """Release key, 32 hex digits."""
    num_vectors: int
    """Its vectors."""
    budget: SessionBudget | None = None
    """The conversation that pays for them, where one does."""


@dataclass(frozen=True, kw_only=True)
class LedgerSummary:
    """Totals."""

    num_lines: int
    """Lines since the run began."""
    num_releases: int
    """Rows released since the run began, replays not counted."""
    num_vectors: dict[str, int]
    """Vectors released since the run began, per boundary, replays not counted."""
    num_replayed_vectors: int
    """Vectors replayed since this ledger was opened: they leave no line."""
    rules: tuple[str, ...]
    """Every noise rule that was used, such as "gaussian scale=0.02"."""


class Ledger:
    """The one writer of a run's ledger file. Safe to call from several threads."""

    def __init__(
        self, log: DurableLog, run_id: str, now: Callable[[], datetime] = lambda: datetime.now(UTC)
    ) -> None:
        """Read what was released before.

        Args:
            log: the open file; this ledger closes it.
            run_id: written into every line.
            now: the clock, timezone-aware.

        Raises:
            StorageError: a line is not a ledger line.
        """
        self._log, self._run_id, self._now = log, run_id, now
        self._lock = threading.Lock()
        self._known: set[bytes] = set()
        self._num_vectors: Counter[str] = Counter()
        self._num_day_vectors: Counter[tuple[str, str]] = Counter()
        self._rules: set[str] = set()
        self._num_lines = 0
        self._num_replayed_vectors = 0
        for record in log.read():
            self._take(_parse(record, f"{log.path} line {self._num_lines + 1}"))

    def __enter__(self) -> "Ledger":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def account(
        self,
        boundary: str,
        event: PrivacyEvent,
        version: str,
        releases: Sequence[Release],
        max_day_vectors: int | None = None,
    ) -> bool:
        """Write down what is about to leave; it is on disk when this returns.

        Args:
            boundary: name of the gate.
            event: noise rule and number of vectors of the whole frame.
            version: weights that made the vectors.
            releases: the frame's rows: all of them leave, or none.
            max_day_vectors: vectors of this gate in a UTC day at most; None sets no limit.

        Returns:
            Whether all of it is a replay (then nothing was written).

        Raises:
            BudgetExceeded: a conversation or the day has no room; nothing was written or spent.
            StorageError: the line cannot be written; nothing may leave.
        """
        with self._lock:
            fresh = {r.key: r for r in releases if bytes.fromhex(r.key) not in self._known}
            num_fresh = sum(release.num_vectors for release in fresh.values())
            if fresh:
                now, paying = self._now().astimezone(UTC), _per_session(fresh.values())
                check_sessions(boundary, paying)
                if max_day_vectors is not None:
                    spent = self._num_day_vectors[boundary, _day(now.isoformat())]
                    check_day(boundary, num_fresh, spent, max_day_vectors, now)
                line = self._line(now, boundary, event, version, list(fresh), num_fresh)
                self._log.append(msgspec.to_builtins(line))
                self._take(line)
                for budget, num_vectors in paying.items():
                    budget.spend(num_vectors)
            self._num_replayed_vectors += event.num_vectors - num_fresh
            return not fresh

    def summary(self) -> LedgerSummary:
        """Totals now."""
        with self._lock:
            return LedgerSummary(
                num_lines=self._num_lines,
                num_releases=len(self._known),
                num_vectors=dict(self._num_vectors),
                num_replayed_vectors=self._num_replayed_vectors,
                rules=tuple(sorted(self._rules)),
            )

    def close(self) -> None:
        """Release the file."""
        self._log.close()

    def _line(
        self,
        now: datetime,
        boundary: str,
        event: PrivacyEvent,
        version: str,
        keys: list[str],
        vectors: int,
    ) -> LedgerLine:
        return LedgerLine(
            time=now.isoformat(timespec="milliseconds"),
            run=self._run_id,
            boundary=boundary,
            mechanism=event.mechanism,
            scale=event.scale,
            version=version,
            keys=keys,
            vectors=vectors,
        )

    def _take(self, line: LedgerLine) -> None:
        self._known.update(bytes.fromhex(key) for key in line.keys)
        self._num_vectors[line.boundary] += line.vectors
        self._num_day_vectors[line.boundary, _day(line.time)] += line.vectors
        self._num_lines += 1
        scale = "" if line.scale is None else f" scale={line.scale!r}"
        self._rules.add(f"{line.mechanism}{scale}")


def _per_session(releases: Iterable[Release]) -> Counter[SessionBudget]:
    wanted: Counter[SessionBudget] = Counter()
    for release in releases:
        if release.budget is not None:
            wanted[release.budget] += release.num_vectors
    return wanted


def _day(time: str) -> str:
    """The date of an ISO 8601 time; lines are in UTC."""
    return time[:10]


def _parse(record: dict[str, object], where: str) -> LedgerLine:
    try:
        line = msgspec.convert(record, LedgerLine)
        if not all(len(bytes.fromhex(key)) == 16 for key in line.keys):
            raise ValueError("a release key has 32 hex digits")
        return line
    except (msgspec.ValidationError, ValueError) as error:
        raise StorageError(
            f"{where} is not a ledger line: {error}; put the original file back"
        ) from error
