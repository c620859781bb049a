"""The owner's account over all runs: budgets in epsilon that no deleted run folder gives back.

One chained file that several runs may write at the same time. A line holds the worst totals of one
run at one boundary; the newest line of each counts. It names no row and holds no content. It does
not decide what a release costs (`spending`) nor write the run's own ledger.

Two files watch each other: a ledger line names the account's state at its release, an account line
the ledger's. Whoever cuts back, replaces or removes one of them is refused by the other.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Protocol

import msgspec

from cutlayer.errors import ConfigError, StorageError
from cutlayer.privacy.budget import BudgetScope, EpsilonBudgetSettings, check_epsilon
from cutlayer.privacy.epsilon import rdp_epsilon
from cutlayer.privacy.spending import BoundaryTotals, Totals
from cutlayer.privacy.spent import NOTHING, Spent
from cutlayer.storage.log import Anchor
from cutlayer.storage.shared_log import SharedLog

__all__ = ["ACCOUNT_FILE", "AccountLine", "Charge", "Guard", "LedgerView", "OwnerAccount"]

ACCOUNT_FILE = "privacy-account.jsonl"


class AccountLine(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One line of the file."""

    time: str
    """When, ISO 8601 in UTC."""
    run: str
    """Run identifier."""
    boundary: str
    """Which gate."""
    day: str
    """UTC date that `today` is of."""
    ever: Totals
    """The run's totals at this gate; rows that others depend on count as the client."""
    today: Totals
    """Those of the day alone."""
    ledger_lines: int
    """Lines of the run's ledger before this release."""
    ledger_hash: str
    """Hash of its last one."""


@dataclass(frozen=True, kw_only=True)
class Charge:
    """What one run wants to be written down, before it releases."""

    run: str
    boundary: str
    now: datetime
    """Timezone-aware."""
    totals: BoundaryTotals
    """After the release."""
    ledger: Anchor
    """The run's ledger before the release."""


@dataclass(frozen=True, kw_only=True)
class LedgerView:
    """What the account has to know of a run's ledger to trust it."""

    anchor: Anchor
    """Its state now."""
    account: Anchor | None
    """The account's state at its last release that the account was told of."""
    check: Callable[[Anchor], None]
    """Raises StorageError where the ledger is not one that had this state."""


class Guard(Protocol):
    """Whoever may forbid a release for what all releases together tell."""

    def meet(
        self,
        run: str,
        boundaries: Mapping[str, BoundaryTotals],
        ledger: LedgerView,
        now: datetime,
    ) -> None:
        """Compare notes with a run's ledger when it is opened."""

    def charge(self, charge: Charge) -> Anchor:
        """Write a release down, or forbid it."""


class OwnerAccount:
    """One run's view of the account; another run has another one over the same file."""

    def __init__(
        self,
        path: Path,
        budget: EpsilonBudgetSettings | None = None,
        shared: frozenset[str] = frozenset(),
    ) -> None:
        """
        Args:
            path: the file; made when something is written.
            budget: limits; None counts without any.
            shared: boundaries whose releases depend on every row, because weights of this side
                train on all of them.
        """
        self.budget = budget or EpsilonBudgetSettings()
        self._shared = shared
        self._log = SharedLog(path)
        self._newest: dict[tuple[str, str], AccountLine] = {}
        self._lost: dict[str, BoundaryTotals] = {}

    def meet(
        self,
        run: str,
        boundaries: Mapping[str, BoundaryTotals],
        ledger: LedgerView,
        now: datetime,
    ) -> None:
        """See `Guard`.

        Raises:
            StorageError: the account or the ledger was edited, cut back, removed or replaced.
        """
        with self._current():
            if ledger.account is not None:
                self._log.check(ledger.account)
            own = [line for (owner, _), line in self._newest.items() if owner == run]
            if own:
                last = max(own, key=lambda line: line.ledger_lines)
                ledger.check(Anchor(last.ledger_lines, last.ledger_hash))
            self._find_lost(run, boundaries, now)
            # The run may be older than the account: what it released counts from now on.
            for name, totals in boundaries.items():
                if (run, name) not in self._newest:
                    line = self._line(
                        Charge(run=run, boundary=name, now=now, totals=totals, ledger=ledger.anchor)
                    )
                    self._log.append(msgspec.to_builtins(line))
                    self._take(line)

    def charge(self, charge: Charge) -> Anchor:
        """See `Guard`.

        Raises:
            BudgetExceeded: a budget has no room.
            ConfigError: a budget in epsilon, and a release that has none.
            StorageError: the account cannot be read, trusted or written.
        """
        with self._current():
            line = self._line(charge)
            if self.budget.covers(charge.boundary):
                for scope in self.budget.limits:
                    self._check(scope, line)
            anchor = self._log.append(msgspec.to_builtins(line))
            self._take(line)
            return anchor

    def spent(self, scope: BudgetScope, run: str, day: str) -> Spent:
        """What counts against a limit now, read afresh.

        Args:
            scope: which limit.
            run: the run that it is asked for.
            day: UTC date, ISO 8601.
        """
        with self._current():
            return self._sum(scope, run, day, self._newest)

    def boundaries(self, run: str) -> dict[str, AccountLine]:
        """The newest line of each boundary of a run, as last read."""
        return {name: line for (owner, name), line in self._newest.items() if owner == run}

    @property
    def num_runs(self) -> int:
        """Runs that have released something, as last read."""
        return len({run for run, _ in self._newest})

    @contextmanager
    def _current(self) -> Iterator[None]:
        with self._log.locked() as added:
            for number, record in enumerate(added):
                self._take(_parse(record, f"{self._log.path}, {number + 1}. of the new lines"))
            yield

    def _take(self, line: AccountLine) -> None:
        self._newest[line.run, line.boundary] = line

    def _find_lost(self, run: str, boundaries: Mapping[str, BoundaryTotals], now: datetime) -> None:
        """What was written here and not in the ledger, after a crash in between, stays counted."""
        nothing = BoundaryTotals(ever=Totals(), today=Totals(), day="")
        for name, old in self.boundaries(run).items():
            totals = boundaries.get(name, nothing)
            found = self._line(
                Charge(run=run, boundary=name, now=now, totals=totals, ledger=Anchor(0, ""))
            )
            today = found.today if found.day == old.day else Totals()
            lost = BoundaryTotals(
                ever=old.ever.minus(found.ever), today=old.today.minus(today), day=old.day
            )
            if lost.ever != Totals():
                self._lost[name] = lost

    def _line(self, charge: Charge) -> AccountLine:
        totals = charge.totals
        ever, today = totals.ever, totals.today
        if charge.boundary in self._shared:
            ever, today = ever.with_shared_rows(), today.with_shared_rows()
        lost = self._lost.get(charge.boundary)
        if lost is not None:
            ever = ever + lost.ever
            today = today + lost.today if lost.day == totals.day else today
        return AccountLine(
            time=charge.now.isoformat(timespec="milliseconds"),
            run=charge.run,
            boundary=charge.boundary,
            day=totals.day,
            ever=ever,
            today=today,
            ledger_lines=charge.ledger.num_lines,
            ledger_hash=charge.ledger.last_hash,
        )

    def _check(self, scope: BudgetScope, line: AccountLine) -> None:
        budget = self.budget
        before = self._sum(scope, line.run, line.day, self._newest)
        newest = {**self._newest, (line.run, line.boundary): line}
        after = self._sum(scope, line.run, line.day, newest)
        if after.is_unbounded:
            raise ConfigError(
                f"{line.boundary}: privacy.budget.{scope}_epsilon counts releases without a "
                f"guarantee ({_unbounded(newest, scope, line)}), so no epsilon can be kept; "
                "nothing was sent: use mechanisms that clip at every boundary, leave a boundary "
                "out of privacy.budget.boundaries, or give other data another privacy.account_file"
            )
        wanted, spent = rdp_epsilon(after, budget.delta), rdp_epsilon(before, budget.delta)
        check_epsilon(line.boundary, budget, scope, wanted, spent)

    def _sum(
        self,
        scope: BudgetScope,
        run: str,
        day: str,
        newest: Mapping[tuple[str, str], AccountLine],
    ) -> Spent:
        total = NOTHING
        for (owner, boundary), line in newest.items():
            is_own = scope is not BudgetScope.RUN or owner == run
            if not is_own or not self.budget.covers(boundary):
                continue
            if scope is not BudgetScope.DAY:
                total = total + line.ever.of(self.budget.unit)
            elif line.day == day:
                total = total + line.today.of(self.budget.unit)
        return total


def _unbounded(
    newest: Mapping[tuple[str, str], AccountLine], scope: BudgetScope, line: AccountLine
) -> str:
    named = [
        f"{boundary} of run {run}"
        for (run, boundary), old in newest.items()
        if old.ever.client.is_unbounded and (scope is not BudgetScope.RUN or run == line.run)
    ]
    return ", ".join(named[:3])


def _parse(record: Mapping[str, object], where: str) -> AccountLine:
    try:
        return msgspec.convert(record, AccountLine)
    except msgspec.ValidationError as error:
        raise StorageError(
            f"{where}, is not an account line: {error}; put the original file back"
        ) from error
