"""What the rounds need from whoever hosts the trunk: start states in, members' contributions out.

It does not run a trunk (`server`), and knows neither frames nor replicas.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

from cutlayer.model.adapters import AdapterSettings, AdapterState

__all__ = ["TrunkPool", "TrunkUpdate", "UpdateKind"]


class UpdateKind(StrEnum):
    """What a member contributes to a round."""

    DELTA = "delta"
    """Trained weights less those at the round's start."""
    GRADIENT = "gradient"
    """The gradient at the round's start."""


@dataclass(frozen=True, kw_only=True)
class TrunkUpdate:
    """What one member's rows did to the trunk's adapter within one attempt of a round."""

    state: AdapterState
    """Trained weights (delta), or gradients of the summed loss (gradient)."""
    weight: int
    """Scored tokens that reached the trunk in steps that were committed."""


class TrunkPool(Protocol):
    """The trunk's side of a round; every member has a slot of its own in it."""

    def layout(self, adapter: AdapterSettings) -> Mapping[str, Sequence[int]]:
        """Key and shape of every adapter tensor of the trunk."""

    def begin_round(
        self, run_id: str, adapter: AdapterSettings, states: Mapping[str, AdapterState]
    ) -> None:
        """Get ready for the runs of one attempt.

        Args:
            run_id: see `wire.federation_messages.round_run_id`.
            adapter: what is trained.
            states: the weights that each member's run starts from, by member; with mixed cuts
                those of the blocks that the member's cut leaves to the trunk.
        """

    def collect(
        self, run_id: str, members: Sequence[str], kind: UpdateKind
    ) -> Mapping[str, TrunkUpdate]:
        """Contributions of these members; who has none is absent. May be asked again."""

    def end_round(self, run_id: str) -> None:
        """Forget the attempt; no error if it is not known."""
