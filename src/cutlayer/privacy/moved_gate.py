"""The gate of a re-cut: adapters of blocks that move to the server, with their moments.

They were learnt from private rows, and whoever holds them may rebuild some of that: nothing passes
without the owner's consent. Vectors of rows leave elsewhere (`boundary`). It does not send.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import InitVar, dataclass, field

from torch import Tensor

from cutlayer.errors import ConfigError
from cutlayer.privacy.boundary import BoundaryName, is_identifier
from cutlayer.privacy.ledger import Ledger, Release
from cutlayer.privacy.mechanism import PrivacyEvent
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
            self._account(name, _digest(tensors))
        return ReleasedAdapter(tensors=tensors, gate=_GATE)

    def _account(self, name: str, content: str) -> None:
        if not is_identifier(name):
            raise ConfigError(f"{BoundaryName.ADAPTERS}: {name!r:.80} is no identifier of a step")
        # Sent again after a crash, the same bytes tell nothing new.
        key = hashlib.sha256(f"{BoundaryName.ADAPTERS}|{name}|{content}".encode()).hexdigest()[:32]
        event = PrivacyEvent(mechanism="none", scale=None, num_vectors=1)
        releases = [Release(key=key, num_vectors=1)]
        self._ledger.account(BoundaryName.ADAPTERS, event, name, releases)


def _digest(tensors: Mapping[str, Packed]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode())
        for buffer in tensors[name].buffers:
            digest.update(buffer)
    return digest.hexdigest()
