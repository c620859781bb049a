"""The gate of a re-cut: adapters of blocks that move to the server, with their moments.

They were learnt from private rows, and whoever holds them may rebuild some of that: nothing passes
without the owner's consent. Vectors of rows leave elsewhere (`boundary`). It does not send.
"""

from collections.abc import Mapping
from dataclasses import InitVar, dataclass, field

from torch import Tensor

from cutlayer.errors import ConfigError
from cutlayer.privacy.boundary import BoundaryName
from cutlayer.privacy.ledger import Ledger
from cutlayer.privacy.whole_release import account_whole, digest_of
from cutlayer.wire.codec import Packed, get_codec
from cutlayer.wire.recut_messages import named_tensors

__all__ = ["MovedGate", "ReleasedAdapter"]


class _Gate:
    """Whoever holds the one instance may make a ReleasedAdapter."""


_GATE = _Gate()


@dataclass(frozen=True, kw_only=True)
class ReleasedAdapter:
    """Weights and moments that may go to the server. Only this module makes one."""

    tensors: Mapping[str, Packed] = field(repr=False)
    """By the names that RECUT gives them."""
    gate: InitVar[_Gate]

    def __post_init__(self, gate: _Gate) -> None:
        if gate is not _GATE:
            raise TypeError("only MovedGate makes a ReleasedAdapter")


class MovedGate:
    """The gate of the re-cuts of one run."""

    def __init__(self, ledger: Ledger, shares: bool) -> None:
        """
        Args:
            ledger: the run's ledger.
            shares: the owner accepts that the server sees the adapters of blocks that move to it.
        """
        self._ledger = ledger
        self._shares = shares

    def require_consent(self, blocks: list[int]) -> None:
        """Refuse before any work what `release` would refuse after it.

        Args:
            blocks: global indices of those whose adapters would become visible, ascending.

        Raises:
            ConfigError: the owner has not accepted that.
        """
        if blocks and not self._shares:
            numbers = ", ".join(map(str, blocks))
            raise ConfigError(
                f"blocks {numbers} would move to the server with the adapter that they learnt from "
                "your rows and with its optimizer moments, and text can be rebuilt from these; "
                "accept it with --share-adapter or recut.share_adapter = true, or choose a cut "
                "that moves blocks to your side alone"
            )

    def release(
        self, weights: Mapping[str, Tensor], moments: Mapping[str, Tensor], name: str
    ) -> ReleasedAdapter:
        """Account and encode what moves; an empty move costs nothing.

        Args:
            weights: of the blocks that move, float32, by key.
            moments: of their optimizer.
            name: identifier of the run and of the step.

        Raises:
            ConfigError: the owner has not accepted it.
            BudgetExceeded: an account over all runs forbids what has no epsilon.
        """
        if weights and not self._shares:
            raise ConfigError(f"{name}: the owner has not accepted that the server sees adapters")
        raw = get_codec("raw")
        tensors = {key: raw.encode(x) for key, x in named_tensors(weights, moments).items()}
        if tensors:
            # Sent again after a crash, the same bytes tell nothing new.
            account_whole(self._ledger, BoundaryName.ADAPTERS, "none", name, digest_of(tensors))
        return ReleasedAdapter(tensors=tensors, gate=_GATE)
