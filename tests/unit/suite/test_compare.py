"""Differences, intervals and agreement, against numbers that can be worked out by hand."""

import numpy as np
import pytest

from cutlayer.errors import DataError
from cutlayer.suite.arms import Arm, sheets
from cutlayer.suite.compare import agreement, common_seeds, difference, score
from cutlayer.suite.result import RunResult
from cutlayer.suite.spec import Method
from tests.unit.suite.made_up import choices, result, small_suite, spec


def _arm(*runs: RunResult) -> Arm:
    """Runs of one setting."""
    [sheet] = sheets(runs)
    [arm] = sheet.arms
    return arm


def _split(seed: int, items: list[float], **more: object) -> RunResult:
    return result(spec(Method.SPLIT, seed), items, **more)


def _central(seed: int, items: list[float], **more: object) -> RunResult:
    return result(spec(Method.CENTRALISED, seed), items, **more)


def test_a_difference_is_the_mean_over_questions_of_the_mean_over_seeds() -> None:
    ours = _arm(_split(0, [1, 1, 0, 0]), _split(1, [1, 0, 1, 0]))
    theirs = _arm(_central(0, [0, 1, 0, 0]), _central(1, [0, 0, 0, 0]))
    gap = difference(ours, theirs, "accuracy")
    assert gap.mean_points == pytest.approx(37.5)
    assert gap.by_seed_points == pytest.approx((25.0, 50.0))
    assert gap.num_questions == 4


def test_an_interval_is_the_plain_percentile_bootstrap_over_questions() -> None:
    ours = _arm(_split(0, [1, 1, 0, 0, 1]), _split(1, [1, 0, 1, 0, 1]))
    theirs = _arm(_central(0, [0, 1, 0, 1, 0]), _central(1, [0, 0, 0, 1, 0]))
    gap = difference(ours, theirs, "accuracy")
    per_question = np.array([1.0, 0.0, 0.5, -1.0, 1.0])
    places = np.random.default_rng(5).integers(0, 5, (200_000, 5))
    low, high = np.quantile(100 * per_question[places].mean(axis=1), [0.025, 0.975])
    assert gap.low_points == pytest.approx(low, abs=11)
    assert gap.high_points == pytest.approx(high, abs=11)
    assert gap == difference(ours, theirs, "accuracy")


def test_pairing_narrows_the_interval_of_two_settings_that_fail_alike() -> None:
    easy = [float(place % 2) for place in range(200)]
    almost = [1 - value if place == 7 else value for place, value in enumerate(easy)]
    gap = difference(_arm(_split(0, almost)), _arm(_central(0, easy)), "accuracy")
    assert gap.high_points - gap.low_points < 2.0
    alone = score(_arm(_split(0, almost)), "accuracy")
    assert 100 * (alone.high - alone.low) > 10.0


def test_seeds_with_questions_of_their_own_are_pooled() -> None:
    ours = _arm(
        _split(0, [1, 1], questions_digest="a"), _split(1, [0, 0, 1, 1], questions_digest="b")
    )
    theirs = _arm(
        _central(0, [0, 0], questions_digest="a"), _central(1, [0, 0, 1, 1], questions_digest="b")
    )
    gap = difference(ours, theirs, "accuracy")
    assert gap.num_questions == 6
    assert gap.mean_points == pytest.approx(100 * 2 / 6)


def test_only_common_seeds_are_compared() -> None:
    ours = _arm(_split(0, [1, 1]), _split(1, [1, 1]))
    theirs = _arm(_central(1, [1, 0]), _central(2, [0, 0]))
    assert common_seeds(ours, theirs) == (1,)
    assert difference(ours, theirs, "accuracy").by_seed_points == pytest.approx((50.0,))
    with pytest.raises(DataError, match="no seed in common"):
        difference(_arm(_split(0, [1])), _arm(_central(1, [1])), "accuracy")


def test_the_untuned_model_is_the_partner_of_every_seed() -> None:
    ours = _arm(_split(3, [1, 1]), _split(4, [1, 0]))
    untuned = _arm(result(spec(Method.UNTUNED), [0, 0]))
    assert difference(ours, untuned, "accuracy").by_seed_points == pytest.approx((100.0, 50.0))


def test_other_questions_are_refused_with_the_names_of_both_runs() -> None:
    ours, theirs = _arm(_split(0, [1])), _arm(_central(0, [1], questions_digest="others"))
    with pytest.raises(DataError, match=r"topics\.split.*topics\.centralised.*different questions"):
        difference(ours, theirs, "accuracy")
    untuned = _arm(result(spec(Method.UNTUNED), [0], questions_digest="others"))
    with pytest.raises(DataError, match="different questions"):
        difference(ours, untuned, "accuracy")


def test_another_number_of_scores_is_refused() -> None:
    with pytest.raises(DataError, match="number of scores"):
        difference(_arm(_split(0, [1, 1])), _arm(_central(0, [1])), "accuracy")
    with pytest.raises(DataError, match=r"\[1, 2\] scores"):
        score(_arm(_split(0, [1, 1]), _split(1, [1])), "accuracy")


def test_a_metric_that_a_run_lacks_is_named_with_those_it_has() -> None:
    with pytest.raises(DataError, match="'f1'; has: accuracy"):
        score(_arm(_split(0, [1])), "f1")


def test_agreement_finds_the_step_and_the_answers_that_differ() -> None:
    unsplit = choices(spec(Method.CENTRALISED), 0.9)
    losses = list(unsplit.losses)
    losses[11] *= 1 + 3e-5
    near, far = list(unsplit.chosen), list(unsplit.log_likelihoods)
    near[0], near[5] = 2, 2
    far[0] = (-1.0, -2.0, -1.00005)
    first_is_tied = choices(spec(Method.CENTRALISED), 0.9, log_likelihoods=tuple(far))
    split = choices(spec(Method.SPLIT), 0.9, losses=tuple(losses), chosen=tuple(near))
    found = agreement(split, first_is_tied)
    assert found.loss_difference == pytest.approx(3e-5)
    assert (found.num_changed, found.num_near_ties, found.num_questions) == (2, 1, 300)
    assert found.log_likelihood_difference == pytest.approx(3.0 - 1.00005)
    assert agreement(unsplit, unsplit).num_changed == 0


def test_agreement_of_replies_compares_their_digests() -> None:
    unsplit = _central(0, [1, 0], reply_digests=("a", "b"), losses=(1.0,))
    split = _split(0, [1, 0], reply_digests=("a", "c"), losses=(1.0,))
    found = agreement(split, unsplit)
    assert (found.num_changed, found.num_near_ties, found.num_questions) == (1, 0, 2)
    assert found.log_likelihood_difference is None


def test_a_loss_that_is_no_number_does_not_pass_for_equal() -> None:
    unsplit = choices(spec(Method.CENTRALISED), 0.9, losses=(1.0, 1.0))
    split = choices(spec(Method.SPLIT), 0.9, losses=(float("nan"), 1.0))
    assert np.isnan(agreement(split, unsplit).loss_difference)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"losses": (1.0,)}, "steps"),
        ({"chosen": (1,)}, "number of answers"),
        ({"questions_digest": "others"}, "different questions"),
    ],
)
def test_runs_that_do_not_match_have_no_agreement(more: dict[str, object], message: str) -> None:
    unsplit, split = (
        choices(spec(Method.CENTRALISED), 0.9),
        choices(spec(Method.SPLIT), 0.9, **more),
    )
    with pytest.raises(DataError, match=message):
        agreement(split, unsplit)
    with pytest.raises(DataError, match="seeds"):
        agreement(choices(spec(Method.SPLIT, 1), 0.9), unsplit)


def test_sheets_do_not_depend_on_the_order_of_results() -> None:
    runs = small_suite()
    assert sheets(runs) == sheets(reversed(runs))


def test_arms_differ_in_their_names() -> None:
    [sheet] = sheets(small_suite())
    names = [arm.name for arm in sheet.scored]
    assert names[:3] == ["untuned", "centralised", "split"]
    assert "4 owners, label-skewed 0.1, fedavg, 5 local steps" in names
    assert "split, p=1 q=5, own processes" in names
    assert len(set(names)) == len(names)


def test_a_third_answer_is_no_near_tie_of_the_two_best() -> None:
    unsplit = result(
        spec(Method.CENTRALISED), [1], chosen=(0,), log_likelihoods=((-1.0, -1.00001, -9.0),)
    )
    for chosen, num_near_ties in ((1, 1), (2, 0)):
        split = result(spec(Method.SPLIT), [0], chosen=(chosen,), log_likelihoods=((-1, -1, -1),))
        found = agreement(split, unsplit)
        assert (found.num_changed, found.num_near_ties) == (1, num_near_ties)


def test_the_untuned_model_is_compared_with_all_seeds_from_either_side() -> None:
    tuned = _arm(_central(0, [1, 1]), _central(1, [1, 0]))
    untuned = _arm(result(spec(Method.UNTUNED), [0, 0]))
    assert common_seeds(untuned, tuned) == (0, 1)
    ahead, behind = (
        difference(tuned, untuned, "accuracy"),
        difference(untuned, tuned, "accuracy"),
    )
    assert behind.by_seed_points == tuple(-points for points in ahead.by_seed_points)
    assert behind.mean_points == -ahead.mean_points == -75.0


def test_an_interval_that_ends_at_zero_contains_it_whatever_rounding_says() -> None:
    """Thirds, as three seeds have: resampled sums that are 0 come out as 1e-18."""
    gaps = [1.0] + [2.0] * 5 + [-1.0] * 2 + [0.0] * 52
    ours = [
        _split(seed, [float(gap > seed) - float(gap < 0 and seed == 0) for gap in gaps])
        for seed in range(3)
    ]
    theirs = [_central(seed, [0.0] * len(gaps)) for seed in range(3)]
    gap = difference(_arm(*ours), _arm(*theirs), "accuracy")
    assert gap.low_points == 0.0
    assert gap.contains_zero


def test_questions_of_one_story_are_resampled_together() -> None:
    gaps = [1.0] * 20 + [-1.0] * 5 + [0.0] * 35
    groups = tuple(place // 20 for place in range(60))
    theirs = _arm(_central(0, [0.0] * 60))
    alone = difference(_arm(_split(0, gaps)), theirs, "accuracy")
    # Older results of the same questions know nothing of groups.
    grouped = difference(_arm(_split(0, gaps, groups=groups)), theirs, "accuracy")
    assert not alone.contains_zero
    assert grouped.contains_zero
    assert grouped.mean_points == alone.mean_points


def test_a_question_that_two_of_three_seeds_share_is_drawn_once_for_both() -> None:
    values = [1.0, 0.0] * 20
    twice = [_split(seed, values, questions_digest="a") for seed in (0, 1)]
    other = _split(2, [1.0], questions_digest="b")
    once = score(_arm(twice[0], other), "accuracy")
    pooled = score(_arm(*twice, other), "accuracy")
    # Repeating the same questions adds nothing to what is known.
    assert pooled.high - pooled.low == pytest.approx(once.high - once.low, rel=0.1)
