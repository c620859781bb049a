"""Means, their standard errors and intervals."""

import math

import numpy as np
import pytest

from cutlayer.errors import DataError
from cutlayer.evaluation.statistics import summarise


def test_the_standard_error_of_a_share_is_the_known_one() -> None:
    summary = summarise([1.0] * 30 + [0.0] * 70)
    assert summary.mean == pytest.approx(0.3)
    assert summary.num_items == 100
    assert summary.standard_error == pytest.approx(math.sqrt(0.3 * 0.7 / 99))


def test_the_interval_is_near_two_standard_errors_for_many_items() -> None:
    summary = summarise(list(np.random.default_rng(1).normal(5, 2, 2000)))
    assert summary.standard_error is not None
    for bound, sign in ((summary.low, -1), (summary.high, 1)):
        expected = summary.mean + sign * 1.96 * summary.standard_error
        assert bound == pytest.approx(expected, abs=0.25 * summary.standard_error)


def test_the_same_scores_give_the_same_interval() -> None:
    scores = [0.0, 1.0, 1.0, 0.25]
    assert summarise(scores) == summarise(scores)


def test_equal_scores_have_no_spread_and_one_score_no_standard_error() -> None:
    equal = summarise([0.5, 0.5, 0.5])
    assert (equal.low, equal.high, equal.standard_error) == (0.5, 0.5, 0.0)
    single = summarise([0.5])
    assert (single.low, single.high, single.standard_error) == (0.5, 0.5, None)
    assert single.values()["n"] == 1


def test_no_score_is_refused() -> None:
    with pytest.raises(DataError, match="no item to score"):
        summarise([])
