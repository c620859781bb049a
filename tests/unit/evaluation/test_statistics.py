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


def test_items_that_stand_and_fall_together_have_a_wider_interval() -> None:
    together = [1.0] * 50 + [0.0] * 50
    groups = [place // 10 for place in range(100)]
    alone, grouped = summarise(together), summarise(together, groups)
    assert grouped.mean == alone.mean
    assert grouped.high - grouped.low > 2.5 * (alone.high - alone.low)
    # Ten groups of one value each are ten items.
    ten = summarise([1.0] * 5 + [0.0] * 5)
    assert (grouped.low, grouped.high) == (ten.low, ten.high)
    assert grouped.standard_error == pytest.approx(ten.standard_error)


def test_groups_of_one_change_nothing() -> None:
    scores = list(np.random.default_rng(2).random(40))
    assert summarise(scores, range(7, 47)) == summarise(scores)


def test_groups_of_several_sizes_keep_the_weight_of_their_items() -> None:
    assert summarise([1.0, 0.0, 0.0, 0.0], [5, 2, 2, 2]).mean == 0.25
    assert summarise([1.0, 0.0], [3, 3]).standard_error is None


def test_another_number_of_groups_is_refused() -> None:
    with pytest.raises(DataError, match="1 groups for 2 scores"):
        summarise([0.0, 1.0], [0])
