"""An epsilon as it is shown: never without its unit, neighbouring relation, delta and assumption.

It computes nothing (`epsilon`).
"""

import math
from dataclasses import dataclass
from enum import StrEnum

__all__ = ["Guarantee", "PrivacyUnit"]


class PrivacyUnit(StrEnum):
    """What is replaced by another one of its kind between two neighbouring inputs."""

    VECTOR = "token vector"
    ROW = "row"
    CLIENT = "client"


_ASSUMPTIONS = {
    PrivacyUnit.VECTOR: "one vector is replaced in all its releases and the others are held fixed, "
    "although behind attention one token changes all later vectors",
    PrivacyUnit.ROW: "all vectors of one row are replaced in all its releases; nothing that other "
    "rows release depends on it",
    PrivacyUnit.CLIENT: "every vector that this owner released is replaced; numbers in headers "
    "are not covered",
}
_SHARED_ROW = (
    "all vectors of one row are replaced; what other rows release depends on it (trained weights, "
    "or rows that are not told apart), so every release counts and nothing is amplified"
)


@dataclass(frozen=True, kw_only=True)
class Guarantee:
    """What whoever saw all that left may learn at most, or that there is no bound."""

    unit: PrivacyUnit
    epsilon: float | None
    """None or infinite: no guarantee."""
    delta: float
    accountant: str
    """RDP or PLD."""
    row_is_shared: bool = False
    """Other rows' releases depend on a row too."""
    relation: str = "replace one"

    @property
    def is_bounded(self) -> bool:
        """Whether there is an epsilon."""
        return self.epsilon is not None and math.isfinite(self.epsilon)

    @property
    def assumption(self) -> str:
        """What has to hold for the number to mean what it says."""
        is_shared = self.unit is PrivacyUnit.ROW and self.row_is_shared
        return _SHARED_ROW if is_shared else _ASSUMPTIONS[self.unit]

    def __str__(self) -> str:
        if not self.is_bounded:
            return "no guarantee (unclipped)"
        return (
            f"epsilon {self.epsilon:.4g} per {self.unit} (delta {self.delta:g}, {self.relation}, "
            f"{self.accountant}; {self.assumption})"
        )
