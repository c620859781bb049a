"""Epsilons of the accountants against the closed form, over noise, numbers of releases and deltas.

`python -m benchmarks.accounting --json`. The reference is written down here once more, from the
papers, and shares no line with what it judges: normal releases by theorem 8 of Balle and Wang
(arXiv 1805.06530) with a noise multiplier of z/2, pure ones by theorem 3.3 of Kairouz, Oh and
Viswanath (arXiv 1311.0776), and DP-Forward's scale by the least sigma that theorem 8 allows.
"""

import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import brentq
from scipy.special import log_ndtr
from scipy.stats import binom

from benchmarks.report import Value, emit, median, parse_arguments, print_table
from cutlayer.privacy.epsilon import pld_epsilon, rdp_epsilon
from cutlayer.privacy.matrix_gaussian import analytic_sigma
from cutlayer.privacy.mechanism import MECHANISMS
from cutlayer.privacy.spent import Spent, spent_once

__all__ = ["Grid", "Point", "closed_form", "least_sigma", "main", "measure", "optimal_pure"]

_ROUNDING = 1e-9
"""Share by which the reference itself may be off."""


@dataclass(frozen=True, kw_only=True)
class Grid:
    """What is tried."""

    scales: tuple[float, ...]
    """z: standard deviation in clips."""
    counts: tuple[int, ...]
    deltas: tuple[float, ...]
    pure: tuple[tuple[float, int], ...]
    """Epsilons of one release, with their number."""
    targets: tuple[float, ...]
    """Epsilons that a matrix is calibrated for."""


STANDARD = Grid(
    scales=(0.5, 1.0, 2.0, 5.0, 20.0, 100.0, 1000.0),
    counts=(1, 10, 100, 10_000),
    deltas=(1e-3, 1e-5, 1e-8),
    pure=((0.001, 10_000), (0.01, 1000), (0.1, 100), (1.0, 20), (5.0, 3)),
    targets=(0.1, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 64.0),
)
SMOKE = Grid(
    scales=(1.0, 20.0),
    counts=(1, 100),
    deltas=(1e-5,),
    pure=((0.1, 100),),
    targets=(1.0, 8.0),
)


@dataclass(frozen=True, kw_only=True)
class Point:
    """One setting."""

    name: str
    delta: float
    reference: float
    pld: float
    rdp: float

    @property
    def rel_diff(self) -> float:
        """Of PLD from the reference."""
        return abs(self.pld / self.reference - 1)

    @property
    def num_below(self) -> int:
        """How many of the two accountants are below the reference."""
        floor = self.reference * (1 - _ROUNDING)
        return (self.pld < floor) + (self.rdp < floor)


def closed_form(multiplier: float, delta: float) -> float:
    """Epsilon of one normal release, by theorem 8 of Balle and Wang."""
    if _delta_of(0.0, multiplier) <= delta:
        return 0.0
    return _root(lambda epsilon: _delta_of(epsilon, multiplier) - delta)


def least_sigma(epsilon: float, delta: float, sensitivity: float) -> float:
    """The least standard deviation that theorem 8 allows."""
    share = _root(lambda x: delta - _delta_of(epsilon, 1 / x) if x else delta)
    return sensitivity / share


def optimal_pure(epsilon: float, count: int, delta: float) -> float:
    """Epsilon of pure releases together, by theorem 3.3 of Kairouz, Oh and Viswanath."""
    i = np.arange(count + 1)
    losses, masses = (2 * i - count) * epsilon, binom.pmf(i, count, 1 / (1 + math.exp(-epsilon)))

    def excess(total: float) -> float:
        return float((masses * -np.expm1(np.minimum(total - losses, 0.0))).sum()) - delta

    return _root(lambda total: excess(total))


def measure(grid: Grid) -> list[Point]:
    """All points of the grid whose reference is an epsilon above 0."""
    points = []
    for delta in grid.deltas:
        for z in grid.scales:
            once = spent_once(MECHANISMS.make("clipped_gaussian", z, 1.0).event(1))
            for count in grid.counts:
                reference = closed_form(z / 2 / math.sqrt(count), delta)
                name = f"z={z:g} x {count}"
                points += _point(name, delta, reference, once.times(count))
        for epsilon, count in grid.pure:
            once = spent_once(MECHANISMS.make("metric_dp", epsilon / 2, 1.0).event(1))
            reference = optimal_pure(epsilon, count, delta)
            points += _point(f"pure {epsilon:g} x {count}", delta, reference, once.times(count))
    return points


def _point(name: str, delta: float, reference: float, spent: Spent) -> list[Point]:
    if reference < 1e-6:
        return []
    found = Point(
        name=name,
        delta=delta,
        reference=reference,
        pld=pld_epsilon(spent, delta),
        rdp=rdp_epsilon(spent, delta),
    )
    return [found]


def _delta_of(epsilon: float, multiplier: float) -> float:
    a, b = 1 / (2 * multiplier), epsilon * multiplier
    return math.exp(log_ndtr(a - b)) - math.exp(epsilon + log_ndtr(-a - b))


def _root(falls: Callable[[float], float]) -> float:
    """Where a function that falls through 0 does so."""
    high = 1.0
    while falls(high) > 0:
        high *= 2
    return float(brentq(falls, 0.0, high, xtol=1e-14, rtol=1e-14, maxiter=500))


def _calibration(grid: Grid) -> float:
    """Largest relative difference of DP-Forward's scale from the least one, sensitivity 2 C."""
    return max(
        abs(analytic_sigma(epsilon, delta, 2.0) / least_sigma(epsilon, delta, 2.0) - 1)
        for epsilon in grid.targets
        for delta in grid.deltas
    )


def _microseconds_of_a_release(repeats: int = 200) -> float:
    """A running epsilon after one more release, none of them seen before."""
    once = spent_once(MECHANISMS.make("clipped_gaussian", 20.0, 1.0).event(1))
    spent, times_us = once.times(1000), []
    for _ in range(repeats):
        spent = spent + once
        began_s = time.perf_counter()
        rdp_epsilon(spent, 1e-5)
        times_us.append((time.perf_counter() - began_s) * 1e6)
    return median(times_us, skip=5)


def main(arguments: Sequence[str] | None = None) -> dict[str, Value]:
    """Compare, print, return the figures."""
    shared = parse_arguments(__doc__ or "", arguments)
    grid = SMOKE if shared.is_smoke else STANDARD
    began_s = time.perf_counter()
    points = measure(grid)
    columns = ("release", "delta", "closed form", "PLD", "RDP", "PLD off by")
    rows = [
        (p.name, f"{p.delta:g}", f"{p.reference:.6g}", f"{p.pld:.6g}", f"{p.rdp:.6g}",
         f"{p.rel_diff:.1e}")
        for p in points
    ]  # fmt: skip
    print_table("epsilons", columns, rows)
    wrong = closed_form(1.0 / math.sqrt(100), 1e-5)
    result: dict[str, Value] = {
        "profile": shared.profile,
        "points": len(points),
        "max_rel_diff": max(point.rel_diff for point in points),
        "below_reference": sum(point.num_below for point in points),
        "max_rdp_over_reference": max(point.rdp / point.reference for point in points),
        "epsilon_z1_x100": pld_epsilon(Spent(gaussian=400.0), 1e-5),
        "epsilon_z1_x100_if_the_multiplier_were_z": wrong,
        "matrix_scale_max_rel_diff": _calibration(grid),
        "rdp_us_per_release": _microseconds_of_a_release(),
        "seconds": time.perf_counter() - began_s,
    }
    emit(result, shared)
    return result


if __name__ == "__main__":
    main(sys.argv[1:])
