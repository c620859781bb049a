"""Epsilons: equal to the closed form, never below it, and of the right sensitivity."""

import math
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import brentq
from scipy.stats import binom, norm

from cutlayer.errors import ConfigError
from cutlayer.privacy.accountant import PldAccountant, RdpAccountant
from cutlayer.privacy.epsilon import gaussian_sum_for, pld_epsilon, rdp_epsilon
from cutlayer.privacy.mechanism import NoiseForm, PrivacyEvent, ReleaseUnit
from cutlayer.privacy.spent import NOTHING, Spent, larger, spent_once

DELTA = 1e-5
GRID = [(1.0, 1), (1.0, 100), (20.0, 100), (200.0, 1000)]


def clipped(z: float, num_vectors: int = 1) -> PrivacyEvent:
    """Normal noise of standard deviation z C on a vector of norm C: two differ by 2 C at most."""
    return PrivacyEvent(
        mechanism="clipped_gaussian",
        scale=z,
        num_vectors=num_vectors,
        clip=1.0,
        form=NoiseForm.GAUSSIAN,
        multiplier=z / 2,
    )


def pure(epsilon: float, num_vectors: int = 1) -> PrivacyEvent:
    return PrivacyEvent(
        mechanism="metric_dp",
        scale=epsilon / 2,
        num_vectors=num_vectors,
        clip=1.0,
        form=NoiseForm.PURE,
        multiplier=epsilon,
    )


def delta_of(epsilon: float, multiplier: float) -> float:
    """Balle and Wang (2018), theorem 8, written down again."""
    a, b = 1 / (2 * multiplier), epsilon * multiplier
    return float(norm.cdf(a - b) - math.exp(epsilon + norm.logcdf(-a - b)))


def closed_form(z: float, count: int, delta: float) -> float:
    """k releases of sensitivity 2 C are one whose noise is smaller by sqrt(k)."""
    multiplier = z / 2 / math.sqrt(count)
    return float(brentq(lambda e: delta_of(e, multiplier) - delta, 0, 1e4, xtol=1e-12))


def kairouz(epsilon: float, count: int, delta: float) -> float:
    """Optimal composition of pure releases: Kairouz, Oh, Viswanath (2015), theorem 3.3."""
    i = np.arange(count + 1)
    losses = (2 * i - count) * epsilon
    masses = binom.pmf(i, count, 1 / (1 + math.exp(-epsilon)))

    def excess(target: float) -> float:
        gains = -np.expm1(np.minimum(target - losses, 0))
        return float((masses * gains).sum()) - delta

    return float(brentq(excess, 0, count * epsilon, xtol=1e-12)) if excess(0) > 0 else 0.0


def composed(kind: type[RdpAccountant], event: PrivacyEvent, count: int) -> RdpAccountant:
    accountant = kind()
    for _ in range(count):
        accountant.compose(event)
    return accountant


@pytest.mark.parametrize(("z", "count"), GRID)
@pytest.mark.parametrize("delta", [1e-5, 1e-8])
def test_pld_equals_the_closed_form_and_neither_is_below_it(z: float, count: int, delta: float):
    exact = closed_form(z, count, delta)
    tight = composed(PldAccountant, clipped(z), count).epsilon(delta)
    fast = composed(RdpAccountant, clipped(z), count).epsilon(delta)
    assert tight == pytest.approx(exact, rel=1e-3)
    assert exact * (1 - 1e-9) <= tight <= fast * (1 + 1e-9)


def test_the_multiplier_is_half_of_z_because_replace_one_moves_a_vector_by_two_clips():
    assert composed(PldAccountant, clipped(1.0), 100).epsilon(DELTA) == pytest.approx(284.4, 1e-3)
    assert composed(PldAccountant, clipped(20.0), 100).epsilon(DELTA) == pytest.approx(4.377, 1e-3)
    # What a multiplier of z would say: add-or-remove's sensitivity C, which is not ours.
    wrong = pld_epsilon(Spent(gaussian=100.0), DELTA)
    assert wrong == pytest.approx(closed_form(2.0, 100, DELTA), rel=1e-3)
    assert wrong < 284.4 / 2


@pytest.mark.parametrize(("epsilon", "count"), [(0.01, 1000), (0.1, 100), (1.0, 20), (2.0, 3)])
def test_pure_releases_compose_as_the_optimal_theorem_says(epsilon: float, count: int):
    exact = kairouz(epsilon, count, DELTA)
    tight = PldAccountant(spent_once(pure(epsilon)).times(count)).epsilon(DELTA)
    fast = RdpAccountant(spent_once(pure(epsilon)).times(count)).epsilon(DELTA)
    assert tight == pytest.approx(exact, rel=1e-3)
    assert exact * (1 - 1e-9) <= tight <= fast * (1 + 1e-9)
    assert fast <= count * epsilon


@pytest.mark.parametrize("epsilon", [1e-8, 1e-4, 0.0099])
def test_small_pure_epsilons_lose_no_digits(epsilon: float, caplog: pytest.LogCaptureFixture):
    count = round((0.5 / epsilon) ** 2)
    normal = rdp_epsilon(Spent(gaussian=count * epsilon**2), DELTA)
    found = rdp_epsilon(Spent(pure=((epsilon, count),)), DELTA)
    assert found == pytest.approx(normal, rel=1e-3)
    assert not caplog.records


def test_a_pure_epsilon_that_no_coin_can_show_is_added_up():
    spent = Spent(pure=((500.0, 3),))
    assert rdp_epsilon(spent, DELTA) == pld_epsilon(spent, DELTA) == 1500.0


def test_normal_and_pure_releases_compose_to_no_more_than_their_sum():
    normal, both = Spent(gaussian=1.0), Spent(gaussian=1.0, pure=((0.5, 2),))
    for epsilon in (rdp_epsilon, pld_epsilon):
        assert epsilon(normal, DELTA) < epsilon(both, DELTA) <= epsilon(normal, DELTA) + 1.0


@pytest.mark.parametrize("gaussian", [1e-6, 1e5, 1e12])
def test_a_distribution_fits_into_memory_at_any_noise(gaussian: float):
    bound = rdp_epsilon(Spent(gaussian=gaussian), DELTA)
    assert 0 <= pld_epsilon(Spent(gaussian=gaussian), DELTA) <= bound < math.inf


@given(st.floats(0.1, 50), st.floats(0.1, 50), st.integers(1, 50), st.integers(1, 50))
@settings(max_examples=15, deadline=None)
def test_order_and_grouping_change_nothing_and_more_is_never_less(
    first: float, second: float, few: int, many: int
):
    a, b = spent_once(clipped(first)).times(few), spent_once(pure(second)).times(many)
    assert a + b == b + a
    assert rdp_epsilon(a + b, DELTA) >= max(rdp_epsilon(a, DELTA), rdp_epsilon(b, DELTA)) - 1e-9
    assert (a + a).gaussian == pytest.approx(a.times(2).gaussian)
    assert larger(a, a.times(2)).gaussian == a.times(2).gaussian


def test_one_more_is_asked_for_without_being_counted():
    for kind in (RdpAccountant, PldAccountant):
        accountant = composed(kind, clipped(10.0), 3)
        before = accountant.epsilon(DELTA)
        after = accountant.epsilon_after(clipped(10.0), DELTA)
        assert accountant.epsilon(DELTA) == before < after
        accountant.compose(clipped(10.0))
        assert accountant.epsilon(DELTA) == pytest.approx(after)


def test_a_row_of_vectors_composes_and_a_row_released_at_once_does_not():
    apart, whole = RdpAccountant(), RdpAccountant()
    apart.compose(clipped(4.0, num_vectors=9))
    whole.compose(
        PrivacyEvent(
            mechanism="matrix_gaussian",
            scale=4.0,
            num_vectors=9,
            clip=1.0,
            form=NoiseForm.GAUSSIAN,
            multiplier=2.0,
            unit=ReleaseUnit.ROW,
        )
    )
    assert apart.spent.gaussian == pytest.approx(9 * whole.spent.gaussian)


def test_without_a_clip_there_is_no_epsilon_however_much_is_added():
    accountant = RdpAccountant()
    accountant.compose(PrivacyEvent(mechanism="gaussian", scale=0.02, num_vectors=1))
    accountant.compose(clipped(1.0))
    assert accountant.epsilon(DELTA) == math.inf
    assert pld_epsilon(accountant.spent, DELTA) == math.inf
    assert rdp_epsilon(NOTHING, DELTA) == 0.0


@pytest.mark.parametrize("multiplier", [None, 0.0, -1.0, math.inf, math.nan])
def test_a_multiplier_that_means_nothing_is_refused(multiplier: float | None):
    event = PrivacyEvent(
        mechanism="odd", scale=1.0, num_vectors=1, form=NoiseForm.PURE, multiplier=multiplier
    )
    with pytest.raises(ConfigError, match=r"odd: multiplier .* nothing was sent"):
        RdpAccountant().compose(event)


def test_a_form_that_the_accountant_does_not_know_is_refused():
    event = PrivacyEvent(
        mechanism="odd",
        scale=1.0,
        num_vectors=1,
        form="laplace",  # type: ignore[arg-type]
        multiplier=1.0,
    )
    with pytest.raises(ConfigError, match="does not know the form 'laplace'"):
        RdpAccountant().epsilon_after(event, DELTA)


@pytest.mark.parametrize("delta", [0.0, 1.0, -1e-5, math.nan])
def test_a_delta_that_is_no_probability_is_refused(delta: float):
    with pytest.raises(ConfigError, match="delta must lie between 0 and 1"):
        rdp_epsilon(Spent(gaussian=1.0), delta)


def test_the_noise_for_an_epsilon_keeps_it_and_a_hundredth_more_does_not():
    allowed = gaussian_sum_for(8.0, DELTA)
    assert pld_epsilon(Spent(gaussian=allowed), DELTA) == pytest.approx(8.0, rel=1e-3)
    assert pld_epsilon(Spent(gaussian=allowed * 1.01), DELTA) > 8.0


def test_the_library_is_not_imported_before_an_epsilon_is_wanted():
    code = "import sys, cutlayer.privacy.ledger; print('dp_accounting' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "False"
