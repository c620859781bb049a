"""The mean of some scores and how sure it is. It knows no metric and no model.

Shapes: G = groups of items that belong together.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cutlayer.errors import DataError

__all__ = ["Summary", "summarise"]

_NUM_RESAMPLES = 1000
_SEED = 0


@dataclass(frozen=True, kw_only=True)
class Summary:
    """A metric over its items."""

    mean: float
    num_items: int
    standard_error: float | None
    """Of independent items: sample standard deviation / sqrt(items). None for a single group."""
    low: float
    """2.5 % quantile of resampled means."""
    high: float
    """97.5 % quantile of resampled means."""

    def values(self) -> dict[str, float | int | None]:
        """JSON form."""
        return {
            "mean": self.mean,
            "n": self.num_items,
            "standard_error": self.standard_error,
            "low": self.low,
            "high": self.high,
        }


def summarise(scores: Sequence[float], groups: Sequence[int] = ()) -> Summary:
    """Mean, standard error and 95 % interval; the same scores always give the same numbers.

    Args:
        scores: one finite score per item.
        groups: number of each item's group; whole groups are resampled, since items of one story
            are not independent. Empty: each item is a group.

    Raises:
        DataError: there is no score, or not one group for each.

    Source: Efron, Bootstrap Methods (1979): percentile interval over 1,000 resamples, seed 0; of
        groups as Davison and Hinkley, Bootstrap Methods and their Application (1997), section 3.8.
    """
    if not scores:
        raise DataError("no item to score; give at least one")
    if groups and len(groups) != len(scores):
        raise DataError(f"{len(groups)} groups for {len(scores)} scores; give one for each")
    x = np.asarray(scores, dtype=np.float64)
    places = np.unique(groups, return_inverse=True)[1] if groups else np.arange(len(x))
    sums_G, sizes_G = np.bincount(places, weights=x), np.bincount(places)
    mean, num_groups = float(x.mean()), len(sizes_G)
    generator = np.random.default_rng(_SEED)
    means = []
    # One resample at a time: memory stays that of the scores.
    for _ in range(_NUM_RESAMPLES):
        drawn = generator.integers(num_groups, size=num_groups)
        means.append(sums_G[drawn].sum() / sizes_G[drawn].sum())
    low, high = np.quantile(means, [0.025, 0.975])
    return Summary(
        mean=mean,
        num_items=len(x),
        standard_error=_standard_error(sums_G - mean * sizes_G, len(x)),
        low=float(low),
        high=float(high),
    )


def _standard_error(residuals_G: NDArray[np.float64], num_items: int) -> float | None:
    """Of a mean, from what each group's sum is away from its share of all."""
    num_groups = len(residuals_G)
    if num_groups < 2:
        return None
    variance = num_groups / (num_groups - 1) * float(np.square(residuals_G).sum())
    return float(np.sqrt(variance)) / num_items
