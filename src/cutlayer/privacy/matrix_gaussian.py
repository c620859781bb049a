"""DP-Forward: a whole row is one matrix, clipped in Frobenius norm, then matrix Gaussian noise.

It does not compose releases into an epsilon (the accountant does) and draws nothing itself.

Shapes: N = vectors of all rows together, D = values of one vector.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from cutlayer.errors import ConfigError
from cutlayer.privacy.clipped_gaussian import clip_factor
from cutlayer.privacy.mechanism import (
    MECHANISMS,
    NoiseForm,
    PrivacyEvent,
    ReleaseUnit,
    positive,
)
from cutlayer.privacy.noise import Noise

__all__ = ["MatrixGaussian", "analytic_sigma"]


@MECHANISMS.register("matrix_gaussian")
class MatrixGaussian:
    """Each row [n, D] clipped to Frobenius norm C, then MN(0, (z C)^2 I, I).

    Two rows of any content are at most S_2(f) = 2C apart, so sigma over sensitivity is z / 2 of a
    whole row. Identity covariances are those of the least noise for a bound on the norm alone. In
    generation the unit is what one call sends of a row: the prompt, then each reply token.

    Source: Du et al., DP-Forward (CCS 2023, arXiv 2309.06746), the analytic matrix Gaussian
        mechanism; `analytic_sigma` is its calibration.
    """

    def __init__(self, scale: float | None = None, clip: float | None = None) -> None:
        """
        Args:
            scale: z, standard deviation of the noise in clips; above 0.
            clip: C, largest Frobenius norm of a row, in units of the activations; above 0.
        """
        meaning = "standard deviation in clips, like 1"
        self.scale = positive("matrix_gaussian", "scale", scale, meaning)
        meaning = "largest norm of a whole row, in units of the activations"
        self.clip = positive("matrix_gaussian", "clip", clip, meaning)

    guarantee = "differential privacy per row (clipped; the ledger counts its epsilon)"

    @property
    def label(self) -> str:
        """See `Mechanism`."""
        return f"matrix_gaussian scale={self.scale!r} clip={self.clip!r}"

    @property
    def sigma(self) -> float:
        """Standard deviation, in units of the activations."""
        return self.scale * self.clip

    def apply(self, x_ND: Tensor, noise: Noise) -> Tensor:
        """See `Mechanism`; in float32, rounded once to the input's dtype."""
        num_vectors, width = x_ND.shape
        noise_ND = noise.standard_normal(num_vectors, width).mul_(self.sigma)
        clipped_ND = x_ND.float() * self._factors(x_ND, noise.lengths)
        return (clipped_ND + noise_ND.to(x_ND.device)).to(x_ND.dtype)

    def _factors(self, x_ND: Tensor, lengths: tuple[int, ...]) -> Tensor:
        """Of each vector that of its row, [N, 1]."""
        square_norms_N = x_ND.float().square().sum(1)
        # Row by row, not scattered: the order of a sum is part of a replay's bytes.
        square_norms_B = torch.stack([row.sum() for row in square_norms_N.split(lengths)])
        factors_B = clip_factor(square_norms_B, self.clip).float()
        repeats_B = torch.tensor(lengths, device=x_ND.device)
        return factors_B.repeat_interleave(repeats_B)[:, None]

    def event(self, num_vectors: int) -> PrivacyEvent:
        """See `Mechanism`."""
        return PrivacyEvent(
            mechanism="matrix_gaussian",
            scale=self.scale,
            num_vectors=num_vectors,
            clip=self.clip,
            form=NoiseForm.GAUSSIAN,
            multiplier=self.scale / 2,
            unit=ReleaseUnit.ROW,
        )


def analytic_sigma(epsilon: float, delta: float, sensitivity: float) -> float:
    """The least standard deviation of normal noise that gives (epsilon, delta) in one release.

    With d0 = Phi(0) - e^eps Phi(-sqrt(2 eps)) and
    B(v, +-) = Phi(+-sqrt(eps v)) - e^eps Phi(-sqrt(eps (v + 2))):
    delta >= d0: v* is the largest v with B(v, +) <= delta, alpha = sqrt(1 + v*/2) - sqrt(v*/2);
    else v* is the least v with B(v, -) <= delta, alpha = sqrt(1 + v*/2) + sqrt(v*/2).
    sigma = alpha S / sqrt(2 eps), the paper's S_2(f) / B with B = sqrt(2 eps) / alpha.

    Args:
        epsilon: above 0.
        delta: between 0 and 1.
        sensitivity: S_2(f), largest L2 (Frobenius) distance of two inputs; 2C for inputs of norm
            up to C that may be replaced by any others.

    Raises:
        ConfigError: a value is out of range.

    Source: Du et al., DP-Forward (CCS 2023), aMGM; Balle and Wang (arXiv 1805.06530), Algorithm 1.
    """
    _check(epsilon, delta, sensitivity)
    if delta >= _gap(0.0, epsilon, 1):
        root = math.sqrt(_crossing(lambda v: _gap(v, epsilon, 1) > delta)[0] / 2)
        # sqrt(1 + v/2) - sqrt(v/2), without the cancellation.
        alpha = 1 / (math.hypot(1, root) + root)
    else:
        root = math.sqrt(_crossing(lambda u: _gap(u, epsilon, -1) <= delta)[1] / 2)
        alpha = math.hypot(1, root) + root
    return alpha * sensitivity / math.sqrt(2 * epsilon)


def _gap(v: float, epsilon: float, sign: int) -> float:
    """B(v, sign) of `analytic_sigma`."""
    first = math.exp(_log_phi(sign * math.sqrt(epsilon * v)))
    # In logarithms: e^eps overflows where the product is small.
    return first - math.exp(epsilon + _log_phi(-math.sqrt(epsilon * (v + 2))))


def _log_phi(x: float) -> float:
    """Logarithm of the normal distribution function."""
    return float(torch.special.log_ndtr(torch.tensor(x, dtype=torch.float64)))


def _crossing(has_crossed: Callable[[float], bool]) -> tuple[float, float]:
    """Neighbouring numbers from 0 on, where a condition that stays true is not yet and is true."""
    below, above = 0.0, 1.0
    while not has_crossed(above):
        below, above = above, 2 * above
    while below < (middle := (below + above) / 2) < above:
        below, above = (below, middle) if has_crossed(middle) else (middle, above)
    return below, above


def _check(epsilon: float, delta: float, sensitivity: float) -> None:
    for name, value in (("epsilon", epsilon), ("sensitivity", sensitivity)):
        if not 0 < value < math.inf:
            raise ConfigError(f"{name} must be above 0 and finite, got {value}")
    if not 0 < delta < 1:
        raise ConfigError(f"delta must be between 0 and 1, got {delta}")
