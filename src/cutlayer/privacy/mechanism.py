"""Noise rules: what is done to a tensor before it leaves, and what that promises.

It does not draw randomness (`noise`), account (`ledger`) or send (`boundary`). A new rule is a
class under `@MECHANISMS.register`; `tests/unit/privacy/test_mechanism.py` runs over all of them.

Shapes: N = vectors of all rows together, D = values of one vector.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol, Self, TypeVar

from pydantic import model_validator
from torch import Tensor

from cutlayer.errors import ConfigError
from cutlayer.privacy.budget import GenerationBudgetSettings
from cutlayer.privacy.noise import Noise
from cutlayer.settings import Settings

__all__ = [
    "MECHANISMS",
    "Gaussian",
    "Mechanism",
    "MechanismRegistry",
    "NoNoise",
    "NoiseForm",
    "NoiseSettings",
    "PrivacyEvent",
    "PrivacySettings",
    "ReleaseUnit",
]


class NoiseForm(StrEnum):
    """What arithmetic a release follows."""

    GAUSSIAN = "gaussian"
    """Clipped, then normal noise: `multiplier` is sigma over the replace-one sensitivity 2C."""
    PURE = "pure"
    """Clipped, then noise with a pure epsilon: `multiplier` is that epsilon."""


class ReleaseUnit(StrEnum):
    """What one application of the noise covers: the clip bounds the norm of this."""

    VECTOR = "token vector"
    ROW = "row"


@dataclass(frozen=True, kw_only=True)
class PrivacyEvent:
    """One release, as arithmetic needs it."""

    mechanism: str
    """Registered name."""
    scale: float | None
    """The scale in the mechanism's own unit; None where it has none."""
    num_vectors: int
    """Vectors released."""
    clip: float | None = None
    """Norm bound C, in units of the activations; None where nothing is clipped."""
    form: NoiseForm | None = None
    """None: no guarantee, no epsilon exists."""
    multiplier: float | None = None
    """See `NoiseForm`, for one application; None without a form."""
    unit: ReleaseUnit = ReleaseUnit.VECTOR
    """What one application covers."""


class Mechanism(Protocol):
    """A noise rule with its scale."""

    @property
    def label(self) -> str:
        """Name and scale in one exact text; two different rules have two different labels."""

    @property
    def guarantee(self) -> str:
        """What this promises, to be printed beside every result."""

    def apply(self, x_ND: Tensor, noise: Noise) -> Tensor:
        """What may be shown instead of `x_ND`; same shape, dtype and device, still in the graph."""

    def event(self, num_vectors: int) -> PrivacyEvent:
        """The entry of releasing that many vectors."""


Maker = Callable[[float | None], Mechanism]
M = TypeVar("M", bound=Maker)


class MechanismRegistry:
    """Noise rules by name."""

    def __init__(self) -> None:
        self._makers: dict[str, Maker] = {}

    def register(self, name: str) -> Callable[[M], M]:
        """Class decorator; the class is called with the scale, or None where none was given."""

        def add(maker: M) -> M:
            assert name not in self._makers, f"mechanism {name} is registered twice"
            self._makers[name] = maker
            return maker

        return add

    @property
    def names(self) -> tuple[str, ...]:
        """Registered names, sorted."""
        return tuple(sorted(self._makers))

    def make(self, name: str, scale: float | None = None) -> Mechanism:
        """The rule of that name.

        Raises:
            ConfigError: the name is unknown, or the scale does not fit it.
        """
        if name not in self._makers:
            raise ConfigError(f"mechanism {name!r} is unknown; known: {', '.join(self.names)}")
        return self._makers[name](scale)


MECHANISMS = MechanismRegistry()


@MECHANISMS.register("none")
class NoNoise:
    """Everything leaves as it is; still counted in the ledger."""

    def __init__(self, scale: float | None = None) -> None:
        if scale is not None:
            raise ConfigError(f"mechanism none takes no scale, got {scale}; remove the scale")

    label = "none"
    guarantee = "no noise: none"

    def apply(self, x_ND: Tensor, noise: Noise) -> Tensor:
        """`x_ND` itself."""
        return x_ND

    def event(self, num_vectors: int) -> PrivacyEvent:
        """See `Mechanism`."""
        return PrivacyEvent(mechanism="none", scale=None, num_vectors=num_vectors)


@MECHANISMS.register("gaussian")
class Gaussian:
    """The published rule: x + N(0, sigma^2) on every value, no clip.

    Without a clip one vector may lie any distance from another, so no epsilon exists at any scale.

    Source: FedSEA-LLaMA (arXiv 2505.15683): scale n is the mean of |noise|. For a centred normal
        E|Z| = sigma * sqrt(2 / pi), hence sigma = n * sqrt(pi / 2).
    """

    def __init__(self, scale: float | None = None) -> None:
        """
        Args:
            scale: n, mean |noise|, in units of the activations; above 0.
        """
        if scale is None or not (0 < scale < math.inf):
            raise ConfigError(
                f"mechanism gaussian needs a scale above 0 (mean |noise|, like 0.02), got {scale}"
            )
        self.scale = float(scale)

    guarantee = "no guarantee (unclipped)"

    @property
    def label(self) -> str:
        """See `Mechanism`."""
        return f"gaussian scale={self.scale!r}"

    @property
    def sigma(self) -> float:
        """Standard deviation, in units of the activations."""
        return self.scale * math.sqrt(math.pi / 2)

    def apply(self, x_ND: Tensor, noise: Noise) -> Tensor:
        """See `Mechanism`; added in float32, rounded once to the input's dtype."""
        num_vectors, width = x_ND.shape
        noise_ND = noise.standard_normal(num_vectors, width).mul_(self.sigma)
        return (x_ND.float() + noise_ND.to(x_ND.device)).to(x_ND.dtype)

    def event(self, num_vectors: int) -> PrivacyEvent:
        """See `Mechanism`."""
        return PrivacyEvent(mechanism="gaussian", scale=self.scale, num_vectors=num_vectors)


class NoiseSettings(Settings):
    """What is done at the two boundaries. `mechanism` has no default on purpose."""

    mechanism: str
    """Noise on activations, in training and generation; a run without noise says "none"."""
    scale: float | None = None
    """Scale of that noise; for gaussian the mean |noise|, in units of the activations."""
    gradient_mechanism: str = "none"
    """Noise on gradients that leave at the upper cut; labels leak through them."""
    gradient_scale: float | None = None
    """Scale of that noise, in units of the summed loss's gradient."""

    @model_validator(mode="before")
    @classmethod
    def _says_what_it_does(cls, table: object) -> object:
        if isinstance(table, dict) and "mechanism" not in table:
            raise ValueError(
                "mechanism is required: a run without noise has to say so "
                f'(mechanism = "none"); known: {", ".join(MECHANISMS.names)}'
            )
        return table

    @model_validator(mode="after")
    def _makes_sense(self) -> Self:
        for name, scale in (
            (self.mechanism, self.scale),
            (self.gradient_mechanism, self.gradient_scale),
        ):
            try:
                MECHANISMS.make(name, scale)
            except ConfigError as error:
                raise ValueError(str(error)) from error
        return self

    def activation_rule(self) -> Mechanism:
        """The rule for head outputs."""
        return MECHANISMS.make(self.mechanism, self.scale)

    def gradient_rule(self) -> Mechanism:
        """The rule for gradients."""
        return MECHANISMS.make(self.gradient_mechanism, self.gradient_scale)


class PrivacySettings(NoiseSettings):
    """Noise, and how much may leave."""

    generation: GenerationBudgetSettings = GenerationBudgetSettings()
    """How much may leave in generation; training does not spend it."""

    def noise(self) -> NoiseSettings:
        """The noise alone, which a run keeps for ever; its budgets may change."""
        return NoiseSettings.model_validate(self.model_dump(exclude={"generation"}))
