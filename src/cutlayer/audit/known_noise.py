"""The noise rule as an attacker may use it: what a candidate would look like, and how far off.

It does not know candidates or rows. Every rule is scored as normal noise of one variance: exact for
the normal ones, and for metric_dp (whose length varies by 1 / sqrt(D) alone) close to it.

Shapes: K = vectors, L = vectors of one row, D = hidden size, X = values compared.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from cutlayer.errors import ConfigError
from cutlayer.privacy.mechanism import Gaussian, Mechanism, NoiseForm, ReleaseUnit

__all__ = [
    "KnownNoise",
    "ReleasedSpace",
    "Space",
    "are_withheld",
    "known_noise",
    "mean_square_norms",
]


@dataclass(frozen=True, kw_only=True)
class KnownNoise:
    """What the rule did to each vector."""

    variance: float
    """Of the noise on each value, in squared units of the activations; 0 without noise."""
    clip: float | None = None
    """Norm bound; None where nothing is clipped."""
    unit: ReleaseUnit = ReleaseUnit.VECTOR
    """Whose norm that bounds."""

    def averaged(self, number: int) -> "KnownNoise":
        """The noise of a mean over `number` independent releases."""
        return replace(self, variance=self.variance / number)

    def clipped(self, h_KD: Tensor, row_factor: float = 1.0) -> Tensor:
        """Candidates after the rule's clip.

        Args:
            h_KD: what the head would make.
            row_factor: share that a clip of whole rows leaves of each vector, see `row_factor`.
        """
        if self.clip is None:
            return h_KD
        if self.unit is ReleaseUnit.ROW:
            return h_KD * row_factor
        norms_K1 = h_KD.norm(dim=1, keepdim=True)
        clipped_KD: Tensor = h_KD * (self.clip / norms_K1.clamp(min=self.clip))
        return clipped_KD

    def row_factor(self, mean_square_norms_L: Tensor) -> float:
        """What a clip of whole rows leaves, from the norms that public rows have there.

        Args:
            mean_square_norms_L: expected squared norm at each position of the row.
        """
        if self.clip is None or self.unit is not ReleaseUnit.ROW:
            return 1.0
        return min(1.0, self.clip / max(1e-12, float(mean_square_norms_L.sum().sqrt())))


def known_noise(rule: Mechanism, width: int) -> KnownNoise:
    """What is known of a rule.

    Args:
        rule: the one at the lower cut.
        width: D.

    Raises:
        ConfigError: a rule whose noise is not described.
    """
    event = rule.event(1)
    if isinstance(rule, Gaussian):
        return KnownNoise(variance=rule.sigma**2)
    if event.mechanism == "none":
        return KnownNoise(variance=0.0)
    if event.form is None or event.clip is None or event.multiplier is None:
        raise ConfigError(
            f"attacks do not know the noise of mechanism {event.mechanism!r}: its event names no "
            "form; describe it in PrivacyEvent (form, clip, multiplier)"
        )
    sensitivity = 2 * event.clip
    if event.form is NoiseForm.GAUSSIAN:
        variance = (event.multiplier * sensitivity) ** 2
    else:
        # Length Gamma(D, 1 / eta): its mean square is D (D + 1) / eta^2.
        variance = (width + 1) * (sensitivity / event.multiplier) ** 2
    return KnownNoise(variance=variance, clip=event.clip, unit=event.unit)


def are_withheld(h_LD: Tensor) -> Tensor:
    """Which vectors of a row never left, boolean [L]: zeros stand in their place."""
    return (h_LD == 0).all(dim=1)


class Space(Protocol):
    """Where observations and candidates are compared."""

    variance: float
    """Of the noise on each compared value."""
    noise: KnownNoise
    """The rule."""

    def observed(self, h_LD: Tensor) -> Tensor:
        """What was released, [L, X]."""

    def expected(self, h_KD: Tensor, row_factor: float = 1.0) -> Tensor:
        """What a candidate's state would be expected to look like, [K, X]."""


class ReleasedSpace:
    """The released vectors themselves."""

    def __init__(self, noise: KnownNoise) -> None:
        self.noise = noise
        self.variance = noise.variance

    def observed(self, h_LD: Tensor) -> Tensor:
        """As released."""
        return h_LD

    def expected(self, h_KD: Tensor, row_factor: float = 1.0) -> Tensor:
        """After the clip."""
        return self.noise.clipped(h_KD, row_factor)


def mean_square_norms(rows_LD: Sequence[Tensor], length: int) -> Tensor:
    """Expected squared norm at each position, float64 [length], from public rows.

    The first position has its own value: models put very large values there.
    """
    firsts = torch.stack([row[0].double().square().sum() for row in rows_LD])
    others = torch.cat([row[1:].double().square().sum(1) for row in rows_LD])
    norms_L = torch.full((length,), float(others.mean() if len(others) else firsts.mean()))
    norms_L[0] = float(firsts.mean())
    return norms_L.double()
