"""How much may leave: vectors of a conversation and of a UTC day, and epsilon of a run and more.

It spends nothing by itself: the ledger asks here under its lock, before it writes a line, and
spends after. A replay costs nothing. Where epsilons are kept for longer than a run: `account`.
"""

from collections.abc import Mapping
from datetime import UTC, datetime, time, timedelta
from enum import StrEnum

from pydantic import Field

from cutlayer.errors import BudgetExceeded
from cutlayer.privacy.guarantee import PrivacyUnit
from cutlayer.privacy.hop_names import without_hop
from cutlayer.settings import Settings

__all__ = [
    "BudgetScope",
    "BudgetedBoundary",
    "EpsilonBudgetSettings",
    "GenerationBudgetSettings",
    "SessionBudget",
    "check_day",
    "check_epsilon",
    "check_sessions",
]


class BudgetScope(StrEnum):
    """How long an epsilon budget lasts."""

    RUN = "run"
    DAY = "day"
    FOREVER = "forever"


class BudgetedBoundary(StrEnum):
    """Boundaries whose releases have an epsilon; the values are those of `BoundaryName`.

    Each counts at every hop of a chain.
    """

    ACTIVATIONS = "activations"
    GRADIENTS = "gradients"
    GENERATION = "generation"


class EpsilonBudgetSettings(Settings):
    """How much may be learnt; only with mechanisms that clip. Absent limits are no limits."""

    run_epsilon: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    """Epsilon of one run, restarts included."""
    day_epsilon: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    """Epsilon of all runs of this account in one UTC day."""
    forever_epsilon: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    """Epsilon of all runs of this account together, for ever."""
    delta: float = Field(default=1e-5, gt=0, lt=1)
    """Delta of these epsilons; well below one over the number of rows."""
    unit: PrivacyUnit = PrivacyUnit.ROW
    """What they protect: token vector, row, client."""
    boundaries: tuple[BudgetedBoundary, ...] = tuple(BudgetedBoundary)
    """Whose releases they count: activations, gradients, generation. Federation updates have no
    epsilon and are never counted."""

    @property
    def limits(self) -> dict[BudgetScope, float]:
        """The limits that are set."""
        given = {
            BudgetScope.RUN: self.run_epsilon,
            BudgetScope.DAY: self.day_epsilon,
            BudgetScope.FOREVER: self.forever_epsilon,
        }
        return {scope: limit for scope, limit in given.items() if limit is not None}

    def covers(self, boundary: str) -> bool:
        """Whether releases at this boundary count."""
        return without_hop(boundary) in self.boundaries


class GenerationBudgetSettings(Settings):
    """How much may leave in generation; one vector is one token of a prompt or a reply."""

    max_session_vectors: int | None = Field(default=None, ge=1)
    """Vectors that one conversation may release; none sets no limit. Replays cost nothing."""
    max_day_vectors: int | None = Field(default=None, ge=1)
    """Vectors of all generations of the run in one UTC day; none sets no limit. It is counted in
    the ledger, so a restart does not open it again."""


class SessionBudget:
    """What one conversation has released and may release. Its ledger alone spends it."""

    def __init__(self, limit: int | None = None) -> None:
        """
        Args:
            limit: vectors; None counts without a limit.
        """
        self.limit = limit
        self._num_spent = 0

    @property
    def num_spent(self) -> int:
        """Vectors released, replays not counted."""
        return self._num_spent

    @property
    def num_left(self) -> int | None:
        """Vectors that may still leave; None where there is no limit."""
        return None if self.limit is None else max(0, self.limit - self._num_spent)

    def spend(self, num_vectors: int) -> None:
        """Count what is in the ledger; for the ledger, and for what a conversation goes on from."""
        self._num_spent += num_vectors


def check_sessions(boundary: str, wanted: Mapping[SessionBudget, int]) -> None:
    """Refuse vectors that a conversation has no room for.

    Args:
        boundary: name of the gate.
        wanted: fresh vectors per conversation.

    Raises:
        BudgetExceeded: a conversation would release more than it may.
    """
    for budget, num_vectors in wanted.items():
        left = budget.num_left
        if left is not None and num_vectors > left:
            raise BudgetExceeded(
                f"{boundary}: this conversation would release {num_vectors} more vectors and has "
                f"{left} of {budget.limit} left (privacy.generation.max_session_vectors); nothing "
                "was sent: begin a new conversation, or raise the limit"
            )


def check_day(boundary: str, num_vectors: int, num_spent: int, limit: int, now: datetime) -> None:
    """Refuse vectors that a day has no room for.

    Args:
        boundary: name of the gate.
        num_vectors: fresh vectors about to leave.
        num_spent: vectors of this gate in the ledger's lines of the same UTC day.
        limit: vectors of a day.
        now: the moment of the release, timezone-aware.

    Raises:
        BudgetExceeded: the day's vectors would be more than the limit.
    """
    if num_spent + num_vectors <= limit:
        return
    day = now.astimezone(UTC).date()
    opens = datetime.combine(day + timedelta(days=1), time(), UTC)
    raise BudgetExceeded(
        f"{boundary}: {num_vectors} vectors would leave and {max(limit - num_spent, 0)} of {limit} "
        f"are left for {day} (privacy.generation.max_day_vectors); nothing was sent: wait until "
        f"{opens.isoformat()}, when the budget opens again, or raise the limit"
    )


def check_epsilon(
    boundary: str, budget: EpsilonBudgetSettings, scope: BudgetScope, wanted: float, spent: float
) -> None:
    """Refuse a release that would bring an epsilon above its limit.

    Args:
        boundary: name of the gate.
        budget: the limits.
        scope: which of them; it is set.
        wanted: epsilon after the release.
        spent: epsilon before it.

    Raises:
        BudgetExceeded: it would be more than the limit.
    """
    limit = budget.limits[scope]
    if wanted <= limit:
        return
    wait = ", wait for the next UTC day" if scope is BudgetScope.DAY else ""
    raise BudgetExceeded(
        f"{boundary}: epsilon per {budget.unit} would be {wanted:.4g} and {spent:.4g} of {limit:g} "
        f"is spent, {max(0.0, limit - spent):.4g} left (privacy.budget.{scope}_epsilon, delta "
        f"{budget.delta:g}, replace one, RDP); nothing was sent: stop here{wait}, raise the limit, "
        "or begin a run with more noise (`cutlayer privacy plan`)"
    )
