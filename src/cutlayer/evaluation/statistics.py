"""The mean of some scores and how sure it is. It knows no metric and no model."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

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
    """Sample standard deviation / sqrt(items); None for a single item."""
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


def summarise(scores: Sequence[float]) -> Summary:
    """Mean, standard error and 95 % interval; the same scores always give the same numbers.

    Args:
        scores: one finite score per item.

    Raises:
        DataError: there is no score.

    Source: Efron, Bootstrap Methods (1979): percentile interval over 1,000 resamples, seed 0.
    """
    if not scores:
        raise DataError("no item to score; give at least one")
    x = np.asarray(scores, dtype=np.float64)
    generator = np.random.default_rng(_SEED)
    # One resample at a time: memory stays that of the scores.
    means = [generator.choice(x, size=len(x)).mean() for _ in range(_NUM_RESAMPLES)]
    low, high = np.quantile(means, [0.025, 0.975])
    error = float(x.std(ddof=1) / np.sqrt(len(x))) if len(x) > 1 else None
    return Summary(
        mean=float(x.mean()),
        num_items=len(x),
        standard_error=error,
        low=float(low),
        high=float(high),
    )
