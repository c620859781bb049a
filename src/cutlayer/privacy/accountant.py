"""What releases add up to, for one unit: compose events, ask for epsilon.

It keeps no file (`ledger`, `account`) and tells no rows apart (`spending`): every event that is
composed here concerns the same vector, row or client.
"""

from typing import Protocol

from cutlayer.privacy.epsilon import pld_epsilon, rdp_epsilon
from cutlayer.privacy.mechanism import PrivacyEvent, ReleaseUnit
from cutlayer.privacy.spent import NOTHING, Spent, spent_once

__all__ = ["Accountant", "PldAccountant", "RdpAccountant", "applications", "spent_by"]


class Accountant(Protocol):
    """Composes releases of one unit."""

    def compose(self, event: PrivacyEvent) -> None:
        """Count a release."""

    def epsilon(self, delta: float) -> float:
        """Epsilon of all that was composed; infinite where something had no guarantee."""

    def epsilon_after(self, event: PrivacyEvent, delta: float) -> float:
        """What it would be after one more release, which is not counted."""


class RdpAccountant:
    """Fast and never below the truth: for running."""

    def __init__(self, spent: Spent = NOTHING) -> None:
        """
        Args:
            spent: what to begin from.
        """
        self.spent = spent

    def compose(self, event: PrivacyEvent) -> None:
        """See `Accountant`.

        Raises:
            ConfigError: the event has a form that no arithmetic here knows.
        """
        self.spent = self.spent + spent_by(event)

    def epsilon(self, delta: float) -> float:
        """See `Accountant`."""
        return rdp_epsilon(self.spent, delta)

    def epsilon_after(self, event: PrivacyEvent, delta: float) -> float:
        """See `Accountant`."""
        return rdp_epsilon(self.spent + spent_by(event), delta)


class PldAccountant(RdpAccountant):
    """Tight: for reports."""

    def epsilon(self, delta: float) -> float:
        """See `Accountant`."""
        return pld_epsilon(self.spent, delta)

    def epsilon_after(self, event: PrivacyEvent, delta: float) -> float:
        """See `Accountant`."""
        return pld_epsilon(self.spent + spent_by(event), delta)


def spent_by(event: PrivacyEvent) -> Spent:
    """What all vectors of an event cost together; one row where the rule covers a row at once."""
    return spent_once(event).times(applications(event.unit, event.num_vectors))


def applications(unit: ReleaseUnit, num_vectors: int) -> int:
    """How often a rule was applied to one row's vectors."""
    return min(1, num_vectors) if unit == ReleaseUnit.ROW else num_vectors
