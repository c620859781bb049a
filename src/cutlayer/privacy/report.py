"""What left and what it tells at most: per boundary, unit and accountant, with the budgets.

It reads no file and prints nothing; `cutlayer privacy show` and the end of a training do.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from cutlayer.privacy.account import OwnerAccount
from cutlayer.privacy.budget import BudgetedBoundary, BudgetScope, EpsilonBudgetSettings
from cutlayer.privacy.epsilon import pld_epsilon, rdp_epsilon
from cutlayer.privacy.guarantee import Guarantee, PrivacyUnit
from cutlayer.privacy.hop_names import without_hop
from cutlayer.privacy.spending import BoundaryTotals, Totals
from cutlayer.privacy.spent import Spent

__all__ = ["BudgetState", "PrivacyReport", "Promise", "budget_states", "privacy_report"]

TOGETHER = "together"
"""Name of all boundaries that have an epsilon, composed."""


@dataclass(frozen=True, kw_only=True)
class Promise:
    """One unit at one boundary, by both accountants."""

    boundary: str
    rdp: Guarantee
    pld: Guarantee | None
    """None where only the fast one was asked."""

    def as_json(self) -> dict[str, object]:
        """Plain values; an epsilon that does not exist is null."""
        pld = None if self.pld is None or not self.pld.is_bounded else self.pld.epsilon
        return {
            "boundary": self.boundary,
            "unit": str(self.rdp.unit),
            "epsilon_rdp": self.rdp.epsilon if self.rdp.is_bounded else None,
            "epsilon_pld": pld,
            "delta": self.rdp.delta,
            "relation": self.rdp.relation,
            "assumption": self.rdp.assumption,
            "text": str(self.pld or self.rdp),
        }


@dataclass(frozen=True, kw_only=True)
class BudgetState:
    """One budget that is set."""

    scope: BudgetScope
    unit: PrivacyUnit
    limit: float
    spent: float
    """By RDP, as it is enforced; infinite where something left without a guarantee."""

    @property
    def left(self) -> float:
        """Epsilon that is not spent; epsilons do not simply add, so less may already be enough."""
        return max(0.0, self.limit - self.spent)

    def as_json(self) -> dict[str, object]:
        """Plain values."""
        spent = self.spent if self.spent != float("inf") else None
        return {
            "scope": str(self.scope),
            "unit": str(self.unit),
            "limit": self.limit,
            "spent": spent,
            "left": self.left,
        }


@dataclass(frozen=True, kw_only=True)
class PrivacyReport:
    """What a run has told so far."""

    num_vectors: Mapping[str, int]
    """Per boundary."""
    promises: tuple[Promise, ...]
    """Per boundary and unit, then of all boundaries together."""
    budgets: tuple[BudgetState, ...]
    uncounted: tuple[str, ...] = ()
    """Boundaries that released something and are in no epsilon, sorted."""

    def summary(self, unit: PrivacyUnit) -> str:
        """One line for the end of a training."""
        for promise in reversed(self.promises):
            if promise.rdp.unit is unit:
                return str(promise.pld or promise.rdp) + self.remainder
        return "nothing has left" if not self.uncounted else self.remainder.removeprefix("; ")

    @property
    def remainder(self) -> str:
        """What to say behind an epsilon of what is not in it; empty where nothing is."""
        if not self.uncounted:
            return ""
        return f"; {', '.join(self.uncounted)} left too, without a guarantee and in no epsilon"

    def as_json(self) -> dict[str, object]:
        """Plain values for a command's result."""
        return {
            "num_vectors": dict(self.num_vectors),
            "promises": [promise.as_json() for promise in self.promises],
            "budgets": [budget.as_json() for budget in self.budgets],
            "uncounted": list(self.uncounted),
        }


def privacy_report(
    totals: Mapping[str, BoundaryTotals],
    num_vectors: Mapping[str, int],
    shared: frozenset[str],
    delta: float,
    budgets: tuple[BudgetState, ...] = (),
    is_tight: bool = True,
) -> PrivacyReport:
    """Epsilons of a run.

    Args:
        totals: what each boundary spent, from `Ledger.spending`.
        num_vectors: vectors per boundary, from `Ledger.summary`.
        shared: boundaries whose releases depend on every row.
        delta: of all epsilons.
        budgets: from `budget_states`.
        is_tight: also ask the PLD accountant, up to some seconds for each epsilon.
    """
    spent = {
        name: found.ever.with_shared_rows() if name in shared else found.ever
        for name, found in totals.items()
        if _has_epsilon(name)
    }
    if len(spent) > 1:
        spent[TOGETHER] = sum(spent.values(), Totals())
    promises = [
        _promise(name, unit, found.of(unit), delta, _is_shared(name, found), is_tight)
        for name, found in spent.items()
        for unit in PrivacyUnit
    ]
    return PrivacyReport(
        num_vectors=num_vectors,
        promises=tuple(promises),
        budgets=budgets,
        uncounted=tuple(sorted(name for name in totals if not _has_epsilon(name))),
    )


def budget_states(
    account: OwnerAccount | None, budget: EpsilonBudgetSettings, run: str, day: str
) -> tuple[BudgetState, ...]:
    """The budgets that are set, read from the account.

    Args:
        account: the owner's account; None where nothing was ever written.
        budget: the limits.
        run: run identifier.
        day: UTC date, ISO 8601.
    """
    return tuple(
        BudgetState(
            scope=scope,
            unit=budget.unit,
            limit=limit,
            spent=(
                0.0
                if account is None
                else rdp_epsilon(account.spent(scope, run, day), budget.delta)
            ),
        )
        for scope, limit in budget.limits.items()
    )


def _has_epsilon(name: str) -> bool:
    return without_hop(name) in tuple(BudgetedBoundary)


def _promise(
    name: str, unit: PrivacyUnit, spent: Spent, delta: float, is_shared: bool, is_tight: bool
) -> Promise:
    def guarantee(epsilon: float, accountant: str) -> Guarantee:
        return Guarantee(
            unit=unit,
            epsilon=epsilon,
            delta=delta,
            accountant=accountant,
            row_is_shared=is_shared,
        )

    tight = guarantee(pld_epsilon(spent, delta), "PLD") if is_tight else None
    return Promise(boundary=name, rdp=guarantee(rdp_epsilon(spent, delta), "RDP"), pld=tight)


def _is_shared(name: str, totals: Totals) -> bool:
    return totals.row == totals.client or name == TOGETHER
