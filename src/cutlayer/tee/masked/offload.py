"""What a masked layer asks of the world: a product of a masked input, and pads. No code.

Shapes: N = tokens, K = inputs and M = products of a layer in one direction (`quantise.Span`).
"""

from typing import Protocol

from torch import Tensor

from cutlayer.tee.masked.field import Words
from cutlayer.tee.masked.quantise import FieldWeight

__all__ = ["Accelerator", "Pad", "PadSource"]


class Accelerator(Protocol):
    """Multiplies by public weights. Nobody trusts it, with numbers or with products."""

    name: str
    """For error messages."""

    def hold(self, name: str, weight: FieldWeight) -> None:
        """Keep a layer's public integers under a name."""

    def multiply(self, name: str, masked_NK: Tensor, transpose: bool) -> Tensor:
        """Products of all limbs and blocks mod p, int32 [N, M].

        Raises:
            TransportError: it is gone or silent.
            PeerMisbehaved: the form of its answer is wrong; the numbers are checked elsewhere.
        """

    def close(self) -> None:
        """Let it go."""


class Pad(Protocol):
    """One pad of one call. Both methods are called once."""

    def fill(self, out: Words) -> None:
        """Overwrite with the pad's next uniform residues.

        The pad itself is the residue plus `online.OFFSET`: what a level is added to.
        """

    def unmask_NM(self) -> Tensor:
        """CENTRE minus the pad's own product, mod p; int32 residues.

        Raises:
            TransportError: who computes it is gone or silent.
            PeerMisbehaved: the form of the answer is wrong.
        """


class PadSource(Protocol):
    """Where pads and their products come from."""

    name: str
    """For error messages."""

    def hold(self, name: str, weight: FieldWeight) -> None:
        """Learn of a layer before the first pad for it."""

    def take(self, name: str, num_tokens: int, transpose: bool) -> Pad:
        """A pad that was never given before.

        Raises:
            CacheFull: none is ready and the settings say not to wait.
            TransportError: who computes its product is gone or silent.
        """

    def close(self) -> None:
        """Let go of pads and whoever makes them."""
