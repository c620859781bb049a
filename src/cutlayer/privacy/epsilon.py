"""Epsilon of what was spent, by dp-accounting: RDP while running, PLD in reports.

It counts nothing (`spending`) and enforces nothing (`account`). dp-accounting takes a second to
import, so it is imported by the first epsilon and not before.

A trap: `GaussianDpEvent` means sigma over the sensitivity under add-or-remove. Ours is
sigma / (2 C), the sensitivity of replace-one already, so it goes in under that relation; under
`REPLACE_ONE` the PLD accountant would double the sensitivity a second time.
"""

import functools
import math
from typing import TYPE_CHECKING

import numpy as np

from cutlayer.errors import ConfigError
from cutlayer.privacy.spent import Spent

if TYPE_CHECKING:
    from dp_accounting.pld.privacy_loss_distribution import PrivacyLossDistribution

__all__ = ["check_delta", "gaussian_sum_for", "pld_epsilon", "rdp_epsilon"]

_ORDERS = (
    1.02,
    1.05,
    *(1 + x / 10 for x in range(1, 100)),
    *range(11, 64),
    *(2**power for power in range(6, 15)),
)
_GRID = 1e-5
"""Step of a privacy loss distribution as a share of its epsilon."""
_MAX_STEP = 0.5
_MAX_PLD_EPSILON, _MAX_PLD_RELEASES = 1e7, 2_000_000
_MAX_DISCRETE = 500.0
_UPWARDS = 1 + 1e-7
"""More than the rounding of a Fourier transform over a distribution."""
_SMALL_PURE = 0.01
_MAX_PURE = 30.0
"""From here on randomised response is a coin of float precision; epsilons are added."""


def check_delta(delta: float) -> float:
    """The delta.

    Raises:
        ConfigError: it is not between 0 and 1.
    """
    if not 0 < delta < 1:
        raise ConfigError(f"delta must lie between 0 and 1, got {delta}; 1e-5 is usual")
    return delta


@functools.lru_cache(maxsize=4096)
def rdp_epsilon(spent: Spent, delta: float) -> float:
    """Upper bound of epsilon by Renyi differential privacy, fast enough for every release.

    Args:
        spent: what left.
        delta: between 0 and 1.

    Source: Mironov (arXiv 1702.07476), proposition 7 for normal noise; Canonne, Kamath, Steinke
        (arXiv 2004.00010), proposition 12 for the conversion.
    """
    check_delta(delta)
    if spent.is_unbounded:
        return math.inf
    if not spent.gaussian and not spent.pure:
        return 0.0
    both = _convert(_gaussian_rdp(spent.gaussian) + _pure_rdp(spent.pure), delta)
    if not spent.pure:
        return both
    normal = _convert(_gaussian_rdp(spent.gaussian), delta) if spent.gaussian else 0.0
    return min(both, normal + spent.pure_sum)


@functools.lru_cache(maxsize=256)
def pld_epsilon(spent: Spent, delta: float) -> float:
    """Epsilon by privacy loss distributions: tight, up to some seconds.

    Where a distribution would not fit into memory (an epsilon above ten million) it is RDP's.

    Args:
        spent: what left.
        delta: between 0 and 1.

    Source: Koskela, Jälkö, Honkela (arXiv 1906.03049); Doroshenko et al. (arXiv 2207.04380) for
        the discretisation, which errs upwards alone.
    """
    bound = rdp_epsilon(spent, delta)
    is_too_much = bound > _MAX_PLD_EPSILON or spent.num_pure > _MAX_PLD_RELEASES
    if bound == 0 or is_too_much or any(epsilon > _MAX_PURE for epsilon, _ in spent.pure):
        return bound
    if bound > _MAX_DISCRETE and not spent.pure:
        # e^epsilon leaves double precision and the library's grid is one too high; the exact value.
        from dp_accounting.gaussian_mechanism import get_epsilon_gaussian

        return min(bound, float(get_epsilon_gaussian(spent.gaussian**-0.5, delta)) * _UPWARDS)
    loss = _losses(spent, _step(spent, bound))
    return min(bound, float(loss.get_epsilon_for_delta(delta)) * _UPWARDS)


def gaussian_sum_for(epsilon: float, delta: float) -> float:
    """The largest sum of 1 / multiplier^2 that keeps an epsilon, by the exact formula.

    Source: Balle and Wang (arXiv 1805.06530), theorem 8.
    """
    from dp_accounting.gaussian_mechanism import get_sigma_gaussian

    return float(get_sigma_gaussian(epsilon, check_delta(delta))) ** -2


def _convert(rdp_O: np.ndarray, delta: float) -> float:
    from dp_accounting.rdp import compute_epsilon

    epsilon, _ = compute_epsilon(_ORDERS, rdp_O, delta)
    return float(epsilon)


def _gaussian_rdp(gaussian: float) -> np.ndarray:
    return np.asarray(_ORDERS) * (gaussian / 2)


def _pure_rdp(pure: tuple[tuple[float, int], ...]) -> np.ndarray:
    total_O = np.zeros(len(_ORDERS))
    for epsilon, count in pure:
        total_O += count * _one_pure_rdp(epsilon)
    return total_O


@functools.lru_cache(maxsize=64)
def _one_pure_rdp(epsilon: float) -> np.ndarray:
    # Randomised response between two values is the worst of all rules with this epsilon.
    import dp_accounting
    from dp_accounting.rdp import RdpAccountant

    if epsilon > _MAX_PURE:
        return np.full(len(_ORDERS), epsilon)
    if epsilon < _SMALL_PURE:
        # Bun and Steinke (arXiv 1605.02065), proposition 3.3. The library's subtraction loses all
        # digits here and may come out negative.
        return np.asarray(_ORDERS) * (epsilon**2 / 2)
    relation = dp_accounting.NeighboringRelation.REPLACE_ONE
    accountant = RdpAccountant(_ORDERS, relation)
    share = 2 / (1 + math.exp(epsilon))
    accountant.compose(dp_accounting.RandomizedResponseDpEvent(share, 2))
    return np.asarray(accountant.rdp, dtype=np.float64)


def _step(spent: Spent, bound: float) -> float:
    """Width of the grid; with one pure epsilon a divisor of it, so that nothing is rounded."""
    step = min(_MAX_STEP, bound * _GRID)
    if len(spent.pure) != 1:
        return step
    (epsilon, count) = spent.pure[0]
    step = max(step, epsilon * count * 1e-6)
    return epsilon / math.ceil(epsilon / step)


def _losses(spent: Spent, step: float) -> "PrivacyLossDistribution":
    from dp_accounting.pld import privacy_loss_distribution as pld

    loss = pld.identity(value_discretization_interval=step)
    if spent.gaussian:
        loss = loss.compose(
            pld.from_gaussian_mechanism(spent.gaussian**-0.5, value_discretization_interval=step)
        )
    for epsilon, count in spent.pure:
        loss = loss.compose(_pure_loss(epsilon, step).self_compose(count))
    return loss


def _pure_loss(epsilon: float, step: float) -> "PrivacyLossDistribution":
    # The library's own rounds both losses up, also where they lie on the grid; over thousands of
    # releases that adds half of the true epsilon. Its accountant ignores a count of them besides.
    from dp_accounting.pld import pld_pmf
    from dp_accounting.pld import privacy_loss_distribution as pld

    likely = 1 / (1 + math.exp(-epsilon))
    up, down = math.ceil(epsilon / step - 1e-9), math.ceil(-epsilon / step - 1e-9)
    masses = {up: likely, down: 1 - likely}
    return pld.PrivacyLossDistribution(pld_pmf.SparsePLDPmf(masses, step, 0.0, True))
