"""Split-and-Denoise: noise whose density falls with its length, for metric (d_chi) privacy.

It does not denoise (the tail's denoiser does) and draws nothing itself.

Shapes: N = vectors of all rows together, D = values of one vector.
"""

from torch import Tensor

from cutlayer.privacy.clipped_gaussian import clip_vectors
from cutlayer.privacy.mechanism import MECHANISMS, NoiseForm, PrivacyEvent, positive
from cutlayer.privacy.noise import Noise

__all__ = ["MetricDP"]


@MECHANISMS.register("metric_dp")
class MetricDP:
    """Each vector clipped to L2 norm C, then noise Z of density proportional to exp(-eta |Z|).

    Of two vectors at distance d after the clip either gives any release with probabilities within
    a factor exp(eta d); as d is at most 2C, the pure epsilon of one vector is 2 C eta. The length
    of the noise is D / eta on average, so protection of all vectors alike needs an eta near 1 / C
    and noise of about D clips.

    Source: Mai et al., Split-and-Denoise (arXiv 2310.09130), section 4: |Z| follows
        Gamma(D, 1 / eta) and the direction is uniform.
    """

    def __init__(self, scale: float | None = None, clip: float | None = None) -> None:
        """
        Args:
            scale: eta, per unit of distance of the activations; above 0. More is less noise.
            clip: C, in units of the activations; above 0.
        """
        meaning = "eta, per unit of distance; more is less noise"
        self.scale = positive("metric_dp", "scale", scale, meaning)
        meaning = "largest norm of a vector, in units of the activations"
        self.clip = positive("metric_dp", "clip", clip, meaning)

    @property
    def guarantee(self) -> str:
        """See `Mechanism`."""
        return (
            f"metric privacy per token vector: eta {self.scale:g} per unit of distance between "
            "activations (clipped; the ledger counts its epsilon)"
        )

    @property
    def label(self) -> str:
        """See `Mechanism`."""
        return f"metric_dp scale={self.scale!r} clip={self.clip!r}"

    def apply(self, x_ND: Tensor, noise: Noise) -> Tensor:
        """See `Mechanism`; added in float32, rounded once to the input's dtype."""
        noise_ND = self._noise(noise, *x_ND.shape)
        return (clip_vectors(x_ND, self.clip) + noise_ND.to(x_ND.device)).to(x_ND.dtype)

    def _noise(self, noise: Noise, num_vectors: int, width: int) -> Tensor:
        # One draw: a second one would repeat the first. (z1^2 + z2^2) / 2 is Exp(1), and the sum
        # of D of those is Gamma(D, 1).
        normals_NX = noise.standard_normal(num_vectors, 3 * width).double()
        direction_ND, lengths_NX = normals_NX[:, :width], normals_NX[:, width:]
        radius_N = lengths_NX.square().sum(1) / (2 * self.scale)
        stretch_N = radius_N / direction_ND.square().sum(1).sqrt()
        return (direction_ND * stretch_N[:, None]).float()

    def event(self, num_vectors: int) -> PrivacyEvent:
        """See `Mechanism`."""
        return PrivacyEvent(
            mechanism="metric_dp",
            scale=self.scale,
            num_vectors=num_vectors,
            clip=self.clip,
            form=NoiseForm.PURE,
            multiplier=2 * self.clip * self.scale,
        )
