"""Verdicts: each target met, missed and not measured, by made-up results."""

import pytest

from cutlayer.suite.arms import Sheet, sheets
from cutlayer.suite.result import RunResult
from cutlayer.suite.spec import Method
from cutlayer.suite.targets import (
    Target,
    Verdict,
    codecs_target,
    equality_target,
    federation_target,
    gain_target,
    recovery_target,
    signed,
    targets,
)
from tests.unit.suite.made_up import choices, result, small_suite, spec

RIGHT, WRONG = [1.0] * 100, [0.0] * 100


def _metric(task: str) -> str:
    return "accuracy"


def _sheet(*runs: RunResult) -> Sheet:
    [sheet] = sheets(runs)
    return sheet


def _scores(num_right: int) -> list[float]:
    return [float(place < num_right) for place in range(100)]


def _central(num_right: int = 90) -> RunResult:
    return result(spec(Method.CENTRALISED), _scores(num_right))


def test_equal_losses_and_answers_meet_the_first_target() -> None:
    runs = [choices(spec(method), 0.9) for method in (Method.CENTRALISED, Method.SPLIT)]
    assert equality_target(_sheet(*runs)).verdict is Verdict.MET


@pytest.mark.parametrize("factor", [1.001, float("nan")])
def test_one_loss_apart_misses_it(factor: float) -> None:
    unsplit = choices(spec(Method.CENTRALISED), 0.9)
    losses = (*unsplit.losses[:-1], unsplit.losses[-1] * factor)
    split = choices(spec(Method.SPLIT), 0.9, losses=losses)
    assert equality_target(_sheet(unsplit, split)).verdict is Verdict.MISSED


def test_another_answer_misses_it_unless_it_was_a_near_tie() -> None:
    unsplit = choices(spec(Method.CENTRALISED), 0.9)
    split = choices(spec(Method.SPLIT), 0.9, chosen=(2, *unsplit.chosen[1:]))
    assert equality_target(_sheet(unsplit, split)).verdict is Verdict.MISSED
    tied = ((-1.0, -1.5, -1.00001), *unsplit.log_likelihoods[1:])
    unsplit = choices(spec(Method.CENTRALISED), 0.9, log_likelihoods=tied)
    assert equality_target(_sheet(unsplit, split)).verdict is Verdict.MET


def test_runs_without_steps_prove_nothing() -> None:
    runs = [choices(spec(m), 0.9, losses=()) for m in (Method.CENTRALISED, Method.SPLIT)]
    assert equality_target(_sheet(*runs)).verdict is Verdict.NOT_MEASURED


@pytest.mark.parametrize(
    ("num_right", "verdict"), [(90, Verdict.MET), (89, Verdict.MET), (88, Verdict.MISSED)]
)
def test_a_codec_may_cost_a_point_and_a_half(num_right: int, verdict: Verdict) -> None:
    run = result(spec(Method.SPLIT, codec="fp8"), _scores(num_right))
    assert codecs_target(_sheet(_central(), run), "fp8", _metric).verdict is verdict


def test_a_codec_with_noise_is_not_the_codec_alone() -> None:
    noised = spec(Method.SPLIT, codec="fp8", mechanism="gaussian", scale=0.1)
    sheet = _sheet(_central(), result(noised, _scores(90)))
    assert codecs_target(sheet, "fp8", _metric).verdict is Verdict.NOT_MEASURED


@pytest.mark.parametrize(
    ("num_right", "profile", "verdict"),
    [
        (87, "small", Verdict.MET),
        (86, "small", Verdict.MISSED),
        (87, "full", Verdict.MISSED),
        (89, "full", Verdict.MET),
    ],
)
def test_the_bound_of_a_federation_is_the_profiles(
    num_right: int, profile: str, verdict: Verdict
) -> None:
    sheet = _sheet(_central(), result(spec(Method.TOGETHER, owners=4), _scores(num_right)))
    assert federation_target(sheet, _metric, profile).verdict is verdict
    assert recovery_target(sheet, _metric, profile).verdict is Verdict.NOT_MEASURED


def test_owners_are_compared_with_unsplit_training_on_the_same_steps_where_there_is() -> None:
    owners = result(spec(Method.TOGETHER, owners=4), _scores(80))
    twin = result(spec(Method.CENTRALISED, owners=4), _scores(81))
    alone = federation_target(_sheet(_central(), owners), _metric, "small")
    with_twin = federation_target(_sheet(_central(), owners, twin), _metric, "small")
    assert (alone.verdict, with_twin.verdict) == (Verdict.MISSED, Verdict.MET)
    assert "same rows in every step" in with_twin.numbers
    assert "same rows" not in alone.numbers


def test_one_strategy_that_recovers_skewed_labels_is_enough_and_all_are_named() -> None:
    poor = spec(Method.TOGETHER, owners=4, alpha=0.1, strategy="fedavg")
    good = spec(Method.TOGETHER, owners=4, alpha=0.1)
    runs = [_central(), result(poor, _scores(50))]
    assert recovery_target(_sheet(*runs), _metric, "small").verdict is Verdict.MISSED
    found = recovery_target(_sheet(*runs, result(good, _scores(90))), _metric, "small")
    assert found.verdict is Verdict.MET
    assert "fedavg: -40.0" in found.numbers
    assert "every_step: 0.0" in found.numbers


@pytest.mark.parametrize(("num_right", "verdict"), [(90, Verdict.MET), (55, Verdict.MISSED)])
def test_training_must_help_outside_the_error_bars(num_right: int, verdict: Verdict) -> None:
    untuned = result(spec(Method.UNTUNED), _scores(50))
    assert gain_target(_sheet(untuned, _central(num_right)), _metric).verdict is verdict


def test_what_a_profile_asks_for_and_nobody_ran_is_not_measured() -> None:
    found = targets(sheets(small_suite()), _metric, "small")
    verdicts = {(one.what.partition(":")[0], one.task): one.verdict for one in found}
    assert verdicts["bf16", "topics"] is Verdict.MET
    assert verdicts["bf16", "sentiment"] is Verdict.NOT_MEASURED
    nothing = targets([], _metric, "medium")
    assert {one.task for one in nothing} <= {"any"}
    assert len(nothing) == 6


def test_seeds_that_are_not_common_measure_nothing() -> None:
    sheet = _sheet(_central(), result(spec(Method.SPLIT, 7, codec="bf16"), _scores(90)))
    found: Target = codecs_target(sheet, "bf16", _metric)
    assert found.verdict is Verdict.NOT_MEASURED


def test_zero_has_no_sign() -> None:
    assert [signed(x) for x in (-0.01, 0.0, 0.04, -1.25, 3.0)] == [
        "0.0",
        "0.0",
        "0.0",
        "-1.2",
        "+3.0",
    ]
