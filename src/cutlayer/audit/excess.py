"""How large residuals are beyond the known noise: codec rounding, and adapters nobody told of.

It is learned from the candidates that were chosen, and belongs to one attack.

Shapes: X = values compared.
"""

import math
import statistics
from collections import deque

from torch import Tensor

__all__ = ["Excess"]

_ROUNDING = 0.003
"""Share of a value that 2-byte formats may round away."""
_TOLERANCE = 4.0
"""Factor on the variance of what was seen before: twice its size is no surprise."""
_STANDARD_DEVIATIONS = 4.0
_MEMORY = 32


class Excess:
    """Variance of a value around its candidate: the rule's, and what was seen beyond it."""

    def __init__(self, noise_variance: float) -> None:
        """
        Args:
            noise_variance: of the known noise, per value.
        """
        self._noise = noise_variance
        self._seen: deque[float] = deque(maxlen=_MEMORY)

    def variance(self, x_X: Tensor) -> float:
        """Of each value of a right candidate's residual."""
        return self._noise + self._beyond(x_X)

    def explains(self, x_X: Tensor, square: float) -> bool:
        """Whether a right candidate may have that squared residual.

        Without other causes its mean is X times the variance, with a standard deviation of
        sqrt(2 X) times it (chi-square).
        """
        width = len(x_X)
        limit = width * (1 + _STANDARD_DEVIATIONS * math.sqrt(2 / width))
        return square <= limit * (self._noise + _TOLERANCE * self._beyond(x_X))

    def learn(self, x_X: Tensor, square: float) -> None:
        """Note the residual of what was chosen."""
        self._seen.append(max(0.0, square / len(x_X) - self._noise))

    def share(self, token_variance: float) -> float:
        """What was seen beyond the known noise, as a share of what differs between tokens."""
        typical = statistics.median(self._seen) if self._seen else 0.0
        return typical / max(token_variance, 1e-12)

    def _beyond(self, x_X: Tensor) -> float:
        rounding = _ROUNDING**2 * float(x_X.square().mean()) + 1e-12
        typical = statistics.median(self._seen) if self._seen else 0.0
        return max(rounding, typical)
