"""The list of everything that left: one durable line per release, before its frame leaves.

It does not decide what may leave nor add noise (`boundary`), and holds no content: a line names
its rows by keyed digests that nobody without the run secret can connect to a row or compare with a
guess. A release whose rows are all in the ledger already is a replay: the same bytes leave again,
nobody learns more, and no line is written. Lines are never changed, removed or rolled back; a
crash between the line and the frame leaves a release counted that may never have left. The line may
also come first and the names after it (`go_ahead`): what the last line allowed then counts.
"""

import threading
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from types import TracebackType

import msgspec

from cutlayer.errors import StorageError
from cutlayer.privacy.account import Charge, Guard, LedgerView
from cutlayer.privacy.budget import SessionBudget, check_day, check_sessions
from cutlayer.privacy.ledger_line import (
    LedgerLine,
    Release,
    line_of,
    lost_line,
    parse_line,
    payment_of,
    rule_of,
)
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
        self._last: LedgerLine | None = None
        """The last line on disk."""
        self._allowed: LedgerLine | None = None
        """The same, while it lets vectors leave; `ahead` is what is left of them."""
        self._goes_ahead = True
        """False once gates were seen to take turns."""
        self._unwritten: LedgerLine | None = None
        """What has left on it; it has been counted."""
        for record in log.read():
            line = parse_line(record, f"{log.path} line {self._num_lines + 1}")
            self._take(line, self._spending.after(payment_of(line)))
            self._last = line
            self._num_lines += 1
        if lost := lost_line(self._last):
            self._write(lost, self._now().astimezone(UTC))

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
        """Write down what is about to leave; it is on disk when this returns, or counted ahead.

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
                if self._is_allowed(line, line.vectors):
                    self._put_off(line)
                else:
                    self._take_turns(line)
                    self._catch_up()
                    self._write(line, now)
                for budget, num_vectors in paying.items():
                    budget.spend(num_vectors)
            self._num_replayed_vectors += event.num_vectors - num_fresh
            return not fresh

    def go_ahead(self, boundary: str, event: PrivacyEvent, version: str) -> None:
        """Let vectors leave before their line: it is then written while nobody waits for the disk.

        Until the next line so many fresh vectors of this gate, rule and UTC day are released
        without one. This line names what left on the one before. Nothing happens where the rule has
        an epsilon or an account is asked: there each release waits for its own line.

        Args:
            boundary: name of a gate whose rows are not told apart.
            event: noise rule, and how many vectors may leave.
            version: weights that will make them.

        Raises:
            StorageError: the line cannot be written.
        """
        with self._lock:
            if self._guard is not None or event.form is not None or not self._goes_ahead:
                return
            now = self._now().astimezone(UTC)
            line = line_of(now, self._run_id, boundary, event, version, [])
            line = msgspec.structs.replace(line, ahead=event.num_vectors)
            left = self._unwritten
            if left is None and self._is_allowed(line, line.ahead):
                return
            if left is not None and rule_of(left) == rule_of(line):
                line = msgspec.structs.replace(line, keys=left.keys, vectors=left.vectors)
            else:
                self._catch_up()
            # Should the disk fail here, nothing more goes ahead.
            self._allowed = None
            self._append(line)
            self._allowed, self._unwritten = line, None

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
            self._end_allowance()
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
        """Name what has left, and release the file."""
        # Where that fails, what the last line allowed counts when the ledger is opened again.
        with self._lock, suppress(StorageError):
            self._end_allowance()
        self._log.close()

    def _is_allowed(self, line: LedgerLine, num_vectors: int) -> bool:
        """Whether so many vectors may leave before a line like this one is written."""
        allowed = self._allowed
        return (
            allowed is not None
            and self._guard is None
            and rule_of(allowed) == rule_of(line)
            and num_vectors <= allowed.ahead
            and line.form is None
            and not line.rows
        )

    def _put_off(self, line: LedgerLine) -> None:
        """Count a release whose line comes later."""
        assert self._allowed is not None
        ahead = self._allowed.ahead - line.vectors
        self._allowed = msgspec.structs.replace(self._allowed, ahead=ahead)
        self._count(line, self._spending.after(payment_of(line)))
        before = self._unwritten
        if before is not None:
            keys, vectors = [*before.keys, *line.keys], before.vectors + line.vectors
            line = msgspec.structs.replace(before, keys=keys, vectors=vectors)
        self._unwritten = line

    def _take_turns(self, line: LedgerLine) -> None:
        """Where gates take turns, as those of a chain, no allowance lives to be used."""
        allowed = self._allowed
        if allowed is not None and self._unwritten is None and allowed.boundary != line.boundary:
            self._goes_ahead = False

    def _catch_up(self) -> None:
        """Name what has left without a line; nothing more does until the next is allowed."""
        self._allowed = None
        if self._unwritten is not None:
            self._append(self._unwritten)
            self._unwritten = None

    def _end_allowance(self) -> None:
        """The same, and what the last line allowed and nobody used does not count either."""
        self._catch_up()
        if self._last is not None and self._last.ahead:
            self._append(msgspec.structs.replace(self._last, keys=[], vectors=0, ahead=0))

    def _append(self, line: LedgerLine) -> None:
        self._log.append(msgspec.to_builtins(line))
        self._last = line
        self._num_lines += 1

    def _write(self, line: LedgerLine, now: datetime) -> None:
        staged = self._spending.after(payment_of(line))
        line = self._charged(line, staged, now)
        self._append(line)
        self._take(line, staged)

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
        self._count(line, staged)
        if line.account is not None:
            self._account = Anchor(*line.account)

    def _count(self, line: LedgerLine, staged: Staged) -> None:
        self._spending.take(staged)
        self._known.update(bytes.fromhex(key) for key in line.keys)
        self._num_vectors[line.boundary] += line.vectors
        self._num_day_vectors[line.boundary, _day(line.time)] += line.vectors
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
