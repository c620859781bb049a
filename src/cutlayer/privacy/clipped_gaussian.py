"""Per-vector clip and normal noise; the clip that all rules share.

It does not compose releases into an epsilon (the accountant does) and draws nothing itself.

Shapes: N = vectors of all rows together, D = values of one vector.
"""

from torch import Tensor

from cutlayer.privacy.mechanism import (
    MECHANISMS,
    NoiseForm,
    PrivacyEvent,
    positive,
)
from cutlayer.privacy.noise import Noise

__all__ = ["ClippedGaussian", "clip_factor", "clip_vectors"]

_INSIDE = 1 - 2**-18
"""Vectors are shrunk to this share of the bound: rounding in float32 then never crosses it."""


def clip_factor(square_norms: Tensor, clip: float) -> Tensor:
    """What to multiply by so that no norm is above `clip`; 1 where it is below already.

    Args:
        square_norms: squared L2 norms, any shape, at least 0.
        clip: C, in the unit of the norms.

    Returns:
        float64 factors of the same shape, differentiable, also at 0.
    """
    # Clamped before the root: its slope at 0 is infinite. Squares that overflow give factor 0.
    bound = clip * _INSIDE
    return bound / square_norms.double().clamp(min=bound * bound).sqrt()


def clip_vectors(x_ND: Tensor, clip: float) -> Tensor:
    """Each vector shrunk to an L2 norm of at most `clip`, float32; the gradient flows through."""
    x_ND = x_ND.float()
    return x_ND * clip_factor(x_ND.square().sum(1, keepdim=True), clip).float()


@MECHANISMS.register("clipped_gaussian")
class ClippedGaussian:
    """Each vector clipped to L2 norm C, then N(0, (z C)^2) on every value.

    Replacing one vector moves a release by at most 2C, so sigma over sensitivity is z / 2. Behind
    a head with attention one token changes all later vectors too: what it says of a token is what
    it says of the row.

    Source: Balle and Wang, Improving the Gaussian Mechanism (arXiv 1805.06530).
    """

    def __init__(self, scale: float | None = None, clip: float | None = None) -> None:
        """
        Args:
            scale: z, standard deviation of the noise in clips; above 0.
            clip: C, in units of the activations; above 0.
        """
        meaning = "standard deviation in clips, like 20"
        self.scale = positive("clipped_gaussian", "scale", scale, meaning)
        meaning = "largest norm of a vector, in units of the activations"
        self.clip = positive("clipped_gaussian", "clip", clip, meaning)

    guarantee = "differential privacy per token vector (clipped; the ledger counts its epsilon)"

    @property
    def label(self) -> str:
        """See `Mechanism`."""
        return f"clipped_gaussian scale={self.scale!r} clip={self.clip!r}"

    @property
    def sigma(self) -> float:
        """Standard deviation, in units of the activations."""
        return self.scale * self.clip

    def apply(self, x_ND: Tensor, noise: Noise) -> Tensor:
        """See `Mechanism`; in float32, rounded once to the input's dtype."""
        num_vectors, width = x_ND.shape
        noise_ND = noise.standard_normal(num_vectors, width).mul_(self.sigma)
        return (clip_vectors(x_ND, self.clip) + noise_ND.to(x_ND.device)).to(x_ND.dtype)

    def event(self, num_vectors: int) -> PrivacyEvent:
        """See `Mechanism`."""
        return PrivacyEvent(
            mechanism="clipped_gaussian",
            scale=self.scale,
            num_vectors=num_vectors,
            clip=self.clip,
            form=NoiseForm.GAUSSIAN,
            multiplier=self.scale / 2,
        )
