"""What the hops of a chain proved, told as one: it is worth what the least of them is.

It opens no channel and judges nothing (`attested`).
"""

from collections.abc import Sequence

from cutlayer.client.attested import Attestation, level
from cutlayer.tee.assurance import Assurance

__all__ = ["ChainAttestation", "of_all_hops"]

_NONE = level(None)


class ChainAttestation(Attestation):
    """For results alone: each hop opens its channels by its own."""

    def __init__(self, hops: Sequence[Attestation | None]) -> None:
        """
        Args:
            hops: the lowest first; None where no proof was asked for.
        """
        self._hops = tuple(hops)

    @property
    def label(self) -> str:
        """See `Attestation`."""
        labels = [level(hop) for hop in self._hops]
        if _NONE in labels:
            return _NONE
        return min(Assurance.named(label) for label in labels).label

    @property
    def line(self) -> str:
        """See `Attestation`; one for each hop."""
        lines = ["attestation: none" if hop is None else hop.line for hop in self._hops]
        return "; ".join(f"hop {number} {line}" for number, line in enumerate(lines, start=1))


def of_all_hops(hops: Sequence[Attestation | None]) -> Attestation | None:
    """What stands beside results; None where no hop was asked for a proof.

    Args:
        hops: the lowest first.
    """
    if len(hops) == 1:
        return hops[0]
    return ChainAttestation(hops) if any(hop is not None for hop in hops) else None
