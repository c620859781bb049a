"""Noise rules: what is done to a tensor before it leaves, and what that promises.

It does not draw randomness (`noise`), account (`ledger`) or send (`boundary`). A new rule is a
class under `@MECHANISMS.register` in a file that this package imports;
`tests/unit/privacy/test_mechanism.py` runs over all of them. The rules that clip have files of
their own; what an epsilon becomes over many releases is the accountant's.

Shapes: N = vectors of all rows together, D = values of one vector.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Protocol, Self, TypeVar

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer, model_validator
from torch import Tensor

from cutlayer.errors import ConfigError
from cutlayer.privacy.budget import (
    BudgetedBoundary,
    EpsilonBudgetSettings,
    GenerationBudgetSettings,
)
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
    "Withhold",
    "positive",
    "refused",
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
    """A noise rule with its scale and clip."""

    @property
    def label(self) -> str:
        """Name, scale and clip in one exact text; two different rules have different labels."""

    @property
    def guarantee(self) -> str:
        """What this promises, to be printed beside every result."""

    def apply(self, x_ND: Tensor, noise: Noise) -> Tensor:
        """What may be shown instead of `x_ND`; same shape, dtype and device, still in the graph."""

    def event(self, num_vectors: int) -> PrivacyEvent:
        """The entry of releasing that many vectors."""


Maker = Callable[[float | None, float | None], Mechanism]
M = TypeVar("M", bound=Maker)


class MechanismRegistry:
    """Noise rules by name."""

    def __init__(self) -> None:
        self._makers: dict[str, Maker] = {}

    def register(self, name: str) -> Callable[[M], M]:
        """Class decorator; the class is called with scale and clip, None where none was given."""

        def add(maker: M) -> M:
            assert name not in self._makers, f"mechanism {name} is registered twice"
            self._makers[name] = maker
            return maker

        return add

    @property
    def names(self) -> tuple[str, ...]:
        """Registered names, sorted."""
        return tuple(sorted(self._makers))

    def make(self, name: str, scale: float | None = None, clip: float | None = None) -> Mechanism:
        """The rule of that name.

        Args:
            name: one of `names`.
            scale: in the rule's own unit, where it takes one.
            clip: norm bound in units of the activations, where it clips.

        Raises:
            ConfigError: the name is unknown, or scale or clip do not fit it.
        """
        if name not in self._makers:
            raise ConfigError(f"mechanism {name!r} is unknown; known: {', '.join(self.names)}")
        return self._makers[name](scale, clip)


MECHANISMS = MechanismRegistry()


def positive(rule: str, parameter: str, value: float | None, meaning: str) -> float:
    """A parameter that a rule needs.

    Raises:
        ConfigError: it is missing, not above 0 or not finite.
    """
    if value is None or not (0 < value < math.inf):
        raise ConfigError(f"mechanism {rule} needs a {parameter} above 0 ({meaning}), got {value}")
    return float(value)


def refused(rule: str, parameter: str, value: float | None) -> None:
    """A parameter that a rule has no use for.

    Raises:
        ConfigError: it is there: somebody expects something of it.
    """
    if value is not None:
        raise ConfigError(
            f"mechanism {rule} takes no {parameter}, got {value}; remove the {parameter}"
        )


@MECHANISMS.register("none")
class NoNoise:
    """Everything leaves as it is; still counted in the ledger."""

    def __init__(self, scale: float | None = None, clip: float | None = None) -> None:
        refused("none", "scale", scale)
        refused("none", "clip", clip)

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

    def __init__(self, scale: float | None = None, clip: float | None = None) -> None:
        """
        Args:
            scale: n, mean |noise|, in units of the activations; above 0.
            clip: none: the published rule has none; clipped_gaussian clips.
        """
        self.scale = positive("gaussian", "scale", scale, "mean |noise|, like 0.02")
        refused("gaussian", "clip", clip)

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


class Withhold(StrEnum):
    """Which vectors stay with the owner; nothing crosses in their place."""

    NONE = "none"
    """All leave."""
    PRIVATE = "private"
    """Vectors of the record's own text stay; those of template and prompt leave."""


_LATER = {
    "clip": None,
    "gradient_clip": None,
    "withhold": Withhold.NONE,
    "keep_share": 0.0,
    "denoiser": False,
}
"""Settings that runs of the first versions did not have, and what they meant by that."""


class NoiseSettings(Settings):
    """What is done at the two boundaries. `mechanism` has no default on purpose."""

    mechanism: str
    """Noise on activations, in training and generation; a run without noise says "none"."""
    scale: float | None = None
    """Scale of that noise. gaussian: mean |noise|, in units of the activations; clipped_gaussian
    and matrix_gaussian: standard deviation in clips; metric_dp: eta, per unit of distance."""
    clip: float | None = None
    """Norm bound, in units of the activations: of a vector, for matrix_gaussian of a whole row.
    Only for the mechanisms that clip."""
    gradient_mechanism: str = "none"
    """Noise on gradients that leave at the upper cut; labels leak through them."""
    gradient_scale: float | None = None
    """Scale of that noise; where it has a unit, that of the summed loss's gradient."""
    gradient_clip: float | None = None
    """Norm bound of those gradients, in units of the summed loss's gradient."""
    withhold: Withhold = Withhold.NONE
    """Which vectors never leave at the lower cut, in training: none, private. Nothing crosses in
    their place, and rows are shorter by them. With private a run cannot generate."""
    keep_share: float = Field(default=0.0, ge=0, le=1)
    """With withhold = private: share of a row's private tokens that leaves all the same, those
    that tell most about the completion; rare ones never do."""
    denoiser: bool = False
    """Whether the tail learns to take the noise off what the trunk returns. It stays at the owner,
    and such a run cannot be exported."""

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
        if self.keep_share and self.withhold is not Withhold.PRIVATE:
            raise ValueError('keep_share needs withhold = "private": without it all leaves')
        for make in (self.activation_rule, self.gradient_rule):
            try:
                make()
            except ConfigError as error:
                raise ValueError(str(error)) from error
        return self

    @model_serializer(mode="wrap")
    def _without_later_defaults(self, dump: SerializerFunctionWrapHandler) -> dict[str, object]:
        # The digest of these settings names a run: one from before these fields keeps its digest.
        table: dict[str, object] = dump(self)
        return {k: v for k, v in table.items() if k not in _LATER or v != _LATER[k]}

    def activation_rule(self) -> Mechanism:
        """The rule for head outputs."""
        return MECHANISMS.make(self.mechanism, self.scale, self.clip)

    def gradient_rule(self) -> Mechanism:
        """The rule for gradients."""
        return MECHANISMS.make(self.gradient_mechanism, self.gradient_scale, self.gradient_clip)


class PrivacySettings(NoiseSettings):
    """Noise, and how much may leave."""

    generation: GenerationBudgetSettings = GenerationBudgetSettings()
    """How much may leave in generation; training does not spend it."""
    budget: EpsilonBudgetSettings = EpsilonBudgetSettings()
    """How much may be learnt from all releases together; only with mechanisms that clip."""
    account_file: Path | None = None
    """What all runs over the same data have spent, one file for all of them; None is
    privacy-account.jsonl beside the run folder. Deleting a run does not touch it."""

    @model_validator(mode="after")
    def _can_keep_an_epsilon(self) -> Self:
        lower = (BudgetedBoundary.ACTIVATIONS, BudgetedBoundary.GENERATION)
        is_kept = self.budget.limits and any(map(self.budget.covers, lower))
        if is_kept and self.activation_rule().event(1).form is None:
            raise ValueError(
                f"privacy.budget keeps an epsilon and mechanism {self.mechanism} has none: it "
                f"promises {self.activation_rule().guarantee!r}; use a mechanism that clips, or "
                "remove the budget"
            )
        return self

    def noise(self) -> NoiseSettings:
        """The noise alone, which a run keeps for ever; its budgets may change."""
        others = PrivacySettings.model_fields.keys() - NoiseSettings.model_fields.keys()
        return NoiseSettings.model_validate(self.model_dump(exclude=others))
