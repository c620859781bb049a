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

from cutlayer.privacy.account import Charge, Guard, LedgerView
from cutlayer.privacy.budget import SessionBudget, check_day, check_sessions
from cutlayer.privacy.ledger_line import LedgerLine, Release, line_of, parse_line, payment_of
from cutlayer.privacy.mechanism import PrivacyEvent
from cutlayer.privacy.spending import BoundaryTotals, RunSpending, Staged
from cutlayer.storage.log import Anchor, DurableLog

__all__ = ["Ledger", "LedgerLine", "LedgerSummary", "Release"]


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
        self._spending = RunSpending()
        self._guard: Guard | None = None
        self._account: Anchor | None = None
        for record in log.read():
            line = parse_line(record, f"{log.path} line {self._num_lines + 1}")
            self._take(line, self._spending.after(payment_of(line)))

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
            BudgetExceeded: a conversation, the day or an epsilon has no room; nothing was written.
            ConfigError: the rule's arithmetic is unknown, or it has none where an epsilon is kept.
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
                line = line_of(now, self._run_id, boundary, event, version, list(fresh.values()))
                staged = self._spending.after(payment_of(line))
                line = self._charged(line, staged, now)
                self._log.append(msgspec.to_builtins(line))
                self._take(line, staged)
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

    def guarded_by(self, guard: Guard) -> None:
        """Ask this account before every release from now on.

        Raises:
            StorageError: the account or this ledger was edited, cut back, removed or replaced.
        """
        with self._lock:
            view = LedgerView(anchor=self._log.anchor, account=self._account, check=self._log.check)
            now = self._now().astimezone(UTC)
            guard.meet(self._run_id, self._spending.boundaries(), view, now)
            self._guard = guard

    @property
    def is_guarded(self) -> bool:
        """Whether an account is asked."""
        return self._guard is not None

    def spending(self) -> dict[str, BoundaryTotals]:
        """What each boundary has spent."""
        with self._lock:
            return self._spending.boundaries()

    def close(self) -> None:
        """Release the file."""
        self._log.close()

    def _charged(self, line: LedgerLine, staged: Staged, now: datetime) -> LedgerLine:
        """The account first: a crash in between leaves a release counted that never left."""
        if self._guard is None:
            return line
        anchor = self._guard.charge(
            Charge(
                run=self._run_id,
                boundary=line.boundary,
                now=now,
                totals=staged.totals,
                ledger=self._log.anchor,
            )
        )
        return msgspec.structs.replace(line, account=(anchor.num_lines, anchor.last_hash))

    def _take(self, line: LedgerLine, staged: Staged) -> None:
        self._spending.take(staged)
        if line.account is not None:
            self._account = Anchor(*line.account)
        self._known.update(bytes.fromhex(key) for key in line.keys)
        self._num_vectors[line.boundary] += line.vectors
        self._num_day_vectors[line.boundary, _day(line.time)] += line.vectors
        self._num_lines += 1
        scale = "" if line.scale is None else f" scale={line.scale!r}"
        clip = "" if line.clip is None else f" clip={line.clip!r}"
        self._rules.add(f"{line.mechanism}{scale}{clip}")


def _per_session(releases: Iterable[Release]) -> Counter[SessionBudget]:
    wanted: Counter[SessionBudget] = Counter()
    for release in releases:
        if release.budget is not None:
            wanted[release.budget] += release.num_vectors
    return wanted


def _day(time: str) -> str:
    """The date of an ISO 8601 time; lines are in UTC."""
    return time[:10]
