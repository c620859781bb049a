"""What releases cost, in the form that composes: sums, not epsilons.

It turns nothing into an epsilon (`epsilon`) and does not know rows or runs (`spending`). Gaussian
releases compose exactly: k of them with multipliers m_i are one with multiplier
1 / sqrt(sum of 1 / m_i^2), whatever was chosen after seeing the earlier ones. Pure releases are
kept as counts.

Source: Dong, Roth, Su: Gaussian Differential Privacy (arXiv 1905.02383), corollary 3.3.
"""

import math
from collections import Counter
from dataclasses import dataclass

from cutlayer.errors import ConfigError
from cutlayer.privacy.mechanism import NoiseForm, PrivacyEvent

__all__ = ["NOTHING", "Spent", "larger", "spent_once"]


@dataclass(frozen=True, slots=True)
class Spent:
    """The composition of some releases. Adding is composing."""

    gaussian: float = 0.0
    """Sum of 1 / multiplier^2 over normal releases; multiplier = sigma / (2 C)."""
    pure: tuple[tuple[float, int], ...] = ()
    """Epsilons of pure releases with their counts, ascending."""
    is_unbounded: bool = False
    """Something left without a guarantee: no epsilon exists."""

    def __add__(self, other: "Spent") -> "Spent":
        return Spent(
            self.gaussian + other.gaussian,
            _sum(self.pure, other.pure),
            self.is_unbounded or other.is_unbounded,
        )

    def minus(self, other: "Spent") -> "Spent":
        """What of this is not in the other."""
        counts = dict(other.pure)
        left = [(epsilon, count - counts.get(epsilon, 0)) for epsilon, count in self.pure]
        return Spent(
            max(0.0, self.gaussian - other.gaussian),
            tuple((epsilon, count) for epsilon, count in left if count > 0),
            self.is_unbounded and not other.is_unbounded,
        )

    def times(self, count: int) -> "Spent":
        """This, `count` times over."""
        if count == 0:
            return NOTHING
        pure = tuple((epsilon, number * count) for epsilon, number in self.pure)
        return Spent(self.gaussian * count, pure, self.is_unbounded)

    @property
    def num_pure(self) -> int:
        """Pure releases."""
        return sum(count for _, count in self.pure)

    @property
    def pure_sum(self) -> float:
        """Epsilon of the pure releases by plain addition."""
        return math.fsum(epsilon * count for epsilon, count in self.pure)


NOTHING = Spent()


def spent_once(event: PrivacyEvent) -> Spent:
    """What one application of an event's rule costs: one vector, or one row where that is its unit.

    Raises:
        ConfigError: a form that has no arithmetic here, or a multiplier that is not above 0.
    """
    if event.form is None:
        return Spent(is_unbounded=True)
    multiplier = event.multiplier
    if multiplier is None or not 0 < multiplier < math.inf:
        raise ConfigError(
            f"mechanism {event.mechanism}: multiplier {multiplier} of a {event.form} release is "
            "not above 0, so it has no epsilon; nothing was sent: choose another scale"
        )
    if event.form == NoiseForm.GAUSSIAN:
        return Spent(gaussian=multiplier**-2)
    if event.form == NoiseForm.PURE:
        return Spent(pure=((multiplier, 1),))
    raise ConfigError(
        f"mechanism {event.mechanism}: the accountant does not know the form {event.form!r}; "
        f"known: {', '.join(NoiseForm)}; nothing was sent: use another mechanism"
    )


def larger(first: Spent, second: Spent) -> Spent:
    """An upper bound of both, exact where they are of one rule."""
    counts = dict(first.pure)
    for epsilon, count in second.pure:
        counts[epsilon] = max(count, counts.get(epsilon, 0))
    return Spent(
        max(first.gaussian, second.gaussian),
        tuple(sorted(counts.items())),
        first.is_unbounded or second.is_unbounded,
    )


def _sum(
    first: tuple[tuple[float, int], ...], second: tuple[tuple[float, int], ...]
) -> tuple[tuple[float, int], ...]:
    if not first or not second:
        return first or second
    counts = Counter(dict(first))
    counts.update(dict(second))
    return tuple(sorted(counts.items()))
