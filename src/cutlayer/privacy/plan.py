"""How much noise an epsilon needs, before anything is released.

It promises no utility: what noise does to a task is measured (`recorded_runs`), not computed.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

from cutlayer.errors import ConfigError
from cutlayer.privacy.epsilon import check_delta, pld_epsilon, rdp_epsilon
from cutlayer.privacy.guarantee import Guarantee, PrivacyUnit
from cutlayer.privacy.mechanism import MECHANISMS, NoiseForm, ReleaseUnit
from cutlayer.privacy.spent import Spent

__all__ = ["NoisePlan", "Workload", "plan_noise"]

_MARGIN = 1e-6
"""So that the rounding of a sum over many releases does not stop the last one."""


@dataclass(frozen=True, kw_only=True)
class Workload:
    """A training run that is planned."""

    rows: int
    epochs: int = 1
    tokens_per_row: int = 128
    head_trains: bool = True
    """False: a row's later epochs are replays of its first."""
    has_gradients: bool = False
    """Gradients leave at the upper cut under the same rule."""

    def __post_init__(self) -> None:
        for name in ("rows", "epochs", "tokens_per_row"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be 1 or more, got {getattr(self, name)}")

    def applications(self, unit: PrivacyUnit, release: ReleaseUnit) -> int:
        """How often the rule is applied to what one unit covers.

        Args:
            unit: what is protected.
            release: what one application covers.
        """
        of_row = 1 if release is ReleaseUnit.ROW else self.tokens_per_row
        times = self.epochs if self.head_trains else 1
        if unit is PrivacyUnit.VECTOR:
            return times + self.epochs * self.has_gradients
        is_alone = unit is PrivacyUnit.ROW and not self.head_trains
        activations = of_row * times * (1 if is_alone else self.rows)
        # Gradients depend on the tail's weights, which learn from every row.
        return activations + self.has_gradients * of_row * self.epochs * self.rows


@dataclass(frozen=True, kw_only=True)
class NoisePlan:
    """The noise that an epsilon needs."""

    mechanism: str
    scale: float
    """For `privacy.scale`."""
    sigma_in_clips: float | None
    """Standard deviation of normal noise in units of C; None for other noise."""
    applications: int
    promised: Guarantee
    """By RDP, as budgets are enforced: just under what was asked for."""
    exact: Guarantee
    """By PLD: what the same noise really gives."""


def plan_noise(
    mechanism: str,
    epsilon: float,
    delta: float,
    unit: PrivacyUnit,
    workload: Workload,
    clip: float = 1.0,
) -> NoisePlan:
    """The least noise whose RDP epsilon is no more than wanted.

    Args:
        mechanism: registered name.
        epsilon: above 0.
        delta: between 0 and 1.
        unit: what is protected.
        workload: what will be released.
        clip: C, in units of the activations; the scale of metric_dp depends on it.

    Raises:
        ConfigError: the mechanism has no epsilon, or a number is out of range.
    """
    if not 0 < epsilon < math.inf:
        raise ConfigError(f"epsilon must be above 0 and finite, got {epsilon}")
    check_delta(delta)
    form, release, unit_multiplier = _arithmetic(mechanism, clip)
    count = workload.applications(unit, release)

    def spent(multiplier: float) -> Spent:
        if form is NoiseForm.GAUSSIAN:
            return Spent(gaussian=count / multiplier**2)
        return Spent(pure=((multiplier, count),))

    def keeps(log_noise: float) -> bool:
        return rdp_epsilon(spent(_multiplier(form, log_noise)), delta) <= epsilon * (1 - _MARGIN)

    multiplier = _multiplier(form, _least(keeps, epsilon))
    scale = multiplier / unit_multiplier
    is_shared = workload.head_trains or workload.has_gradients
    guarantees = [
        Guarantee(unit=unit, epsilon=value, delta=delta, accountant=name, row_is_shared=is_shared)
        for name, value in (
            ("RDP", rdp_epsilon(spent(multiplier), delta)),
            ("PLD", pld_epsilon(spent(multiplier), delta)),
        )
    ]
    return NoisePlan(
        mechanism=mechanism,
        scale=scale,
        sigma_in_clips=2 * multiplier if form is NoiseForm.GAUSSIAN else None,
        applications=count,
        promised=guarantees[0],
        exact=guarantees[1],
    )


def _arithmetic(mechanism: str, clip: float) -> tuple[NoiseForm, ReleaseUnit, float]:
    """Form, unit, and the multiplier at scale 1, which grows with the scale."""
    if mechanism not in MECHANISMS.names:
        raise ConfigError(
            f"mechanism {mechanism!r} is unknown; known: {', '.join(MECHANISMS.names)}"
        )
    if mechanism in ("none", "gaussian"):
        raise ConfigError(
            f"mechanism {mechanism} has no epsilon at any scale, because it does not clip; use "
            "clipped_gaussian, matrix_gaussian or metric_dp"
        )
    event = MECHANISMS.make(mechanism, 1.0, clip).event(1)
    if event.form is None or event.multiplier is None:
        raise ConfigError(f"mechanism {mechanism} has no epsilon; choose one that clips")
    return event.form, event.unit, event.multiplier


def _multiplier(form: NoiseForm, log_noise: float) -> float:
    # More noise is a larger share of the sensitivity, or a smaller pure epsilon.
    return math.exp(log_noise if form is NoiseForm.GAUSSIAN else -log_noise)


def _least(keeps: Callable[[float], bool], epsilon: float) -> float:
    low, high = -30.0, 40.0
    if not keeps(high):
        raise ConfigError(f"no noise keeps an epsilon of {epsilon} here; ask for a larger one")
    while high - low > 1e-9:
        middle = (low + high) / 2
        low, high = (low, middle) if keeps(middle) else (middle, high)
    return high
