"""Effort that counts looks at the clock, so that a limit in time falls at the same step always.

It does not measure time.
"""

import itertools

from cutlayer.audit.attack import Effort

__all__ = ["steps"]


def steps(num_steps: int, seed: int = 0) -> Effort:
    """An effort of about that many steps: every look at its clock takes one second."""
    ticks = itertools.count()
    return Effort(seconds=float(num_steps), seed=seed, clock_s=lambda: float(next(ticks)))
