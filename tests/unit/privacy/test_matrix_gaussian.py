"""The calibration of DP-Forward against the privacy profile of normal noise, in another library."""

import math

import pytest
from scipy.stats import norm

from cutlayer.errors import ConfigError
from cutlayer.privacy.matrix_gaussian import MatrixGaussian, analytic_sigma


def delta_of(sigma: float, epsilon: float, sensitivity: float) -> float:
    """Balle and Wang 2018, Theorem 8: the least delta of that noise."""
    a, b = sensitivity / (2 * sigma), epsilon * sigma / sensitivity
    return math.exp(norm.logcdf(a - b)) - math.exp(epsilon + norm.logcdf(-a - b))


@pytest.mark.parametrize("epsilon", [0.001, 0.1, 1.0, 8.0, 284.0, 100_000.0])
@pytest.mark.parametrize("delta", [1e-10, 1e-5, 0.1, 0.9])
def test_the_calibrated_scale_is_the_least_that_gives_epsilon_and_delta(
    epsilon: float, delta: float
):
    sigma = analytic_sigma(epsilon, delta, 2.0)
    assert delta_of(sigma, epsilon, 2.0) == pytest.approx(delta, rel=1e-6)
    assert delta_of(sigma * 0.999, epsilon, 2.0) > delta


def test_the_calibrated_scale_equals_the_published_formula():
    # B(u, -) = delta, then alpha = sqrt(1 + u/2) + sqrt(u/2) and sigma = alpha S / sqrt(2 eps).
    def gap(u: float) -> float:
        return float(norm.cdf(-math.sqrt(u)) - math.e * norm.cdf(-math.sqrt(u + 2)))

    sigma = analytic_sigma(1.0, 1e-5, 1.0)
    alpha = sigma * math.sqrt(2)
    u = (alpha - 1 / alpha) ** 2 / 2
    assert gap(u) == pytest.approx(1e-5, rel=1e-9)
    assert sigma == pytest.approx(3.7306, abs=1e-4)


def test_scale_grows_with_the_sensitivity_and_shrinks_with_epsilon_and_delta():
    assert analytic_sigma(1, 1e-5, 6.0) == pytest.approx(3 * analytic_sigma(1, 1e-5, 2.0))
    assert analytic_sigma(2, 1e-5, 2.0) < analytic_sigma(1, 1e-5, 2.0)
    assert analytic_sigma(1, 1e-4, 2.0) < analytic_sigma(1, 1e-5, 2.0)


def test_a_calibrated_rule_has_the_multiplier_of_replacing_a_row():
    clip = 12.0
    rule = MatrixGaussian(analytic_sigma(4.0, 1e-5, 2 * clip) / clip, clip)
    event = rule.event(50)
    assert event.multiplier == pytest.approx(analytic_sigma(4.0, 1e-5, 1.0))
    assert delta_of(rule.sigma, 4.0, 2 * clip) == pytest.approx(1e-5)
    # Taken for the sensitivity, the clip alone would promise twice too much.
    assert delta_of(rule.sigma / 2, 4.0, 2 * clip) > 1e-2


@pytest.mark.parametrize(
    ("epsilon", "delta", "sensitivity"),
    [(0, 1e-5, 1), (math.nan, 1e-5, 1), (1, 0, 1), (1, 1, 1), (1, math.nan, 1), (1, 0.1, 0)],
)
def test_values_out_of_range_are_refused(epsilon: float, delta: float, sensitivity: float):
    with pytest.raises(ConfigError, match="must be"):
        analytic_sigma(epsilon, delta, sensitivity)
