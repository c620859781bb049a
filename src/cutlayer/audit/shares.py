"""A share of counted things and how sure it is. It counts nothing."""

import math
from dataclasses import dataclass

__all__ = ["Share", "share"]

_Z_95 = 1.959963984540054


@dataclass(frozen=True, kw_only=True)
class Share:
    """A share with its 95 % Wilson interval."""

    value: float
    low: float
    high: float
    num: int
    """Things counted."""


def share(num_found: int, num: int) -> Share:
    """`num_found` of `num` things, which are at least one.

    Source: Wilson, Probable Inference, the Law of Succession, and Statistical Inference (1927):
        (p + z^2 / 2n +- z sqrt(p (1 - p) / n + z^2 / 4n^2)) / (1 + z^2 / n), z = 1.96.
    """
    assert 0 <= num_found <= num
    assert num
    p, z2 = num_found / num, _Z_95**2
    centre = p + z2 / (2 * num)
    spread = _Z_95 * math.sqrt(p * (1 - p) / num + z2 / (4 * num**2))
    scale = 1 + z2 / num
    low, high = max(0.0, (centre - spread) / scale), min(1.0, (centre + spread) / scale)
    # Rounding must not leave the share outside its own interval.
    return Share(value=p, low=min(low, p), high=max(high, p), num=num)
