from dataclasses import replace

import pytest

from cutlayer.audit.grid import Rule, TrialSpec
from cutlayer.audit.search import Tried, search
from cutlayer.audit.settings import Phase, SearchPlan

PLAN = SearchPlan(max_trials=40, halvings=4)


def spec(scale: float | None, mechanism: str = "gaussian", lower: int = 2) -> TrialSpec:
    rule = Rule(mechanism=mechanism, scale=scale)
    return TrialSpec(lower=lower, upper=27, rule=rule, withhold="none", phase=Phase.BASE)


def world(tried_spec: TrialSpec) -> Tried:
    """Recovery and utility fall with the noise; a deeper cut leaks less at the same utility."""
    scale = tried_spec.rule.scale or 0.0
    noise = 1 / scale if tried_spec.rule.mechanism == "metric_dp" else scale
    recovery = max(0.0, 1.0 - noise / tried_spec.lower)
    return Tried(spec=tried_spec, recovery=recovery, utility=0.9 - 0.1 * noise)


def test_the_scale_is_bisected_down_to_the_least_noise_that_keeps_to_the_target() -> None:
    answer = search([spec(None, "none"), spec(0.5), spec(4.0)], 0.1, PLAN, world)
    assert answer.best is not None
    assert answer.best.spec.rule.scale is not None
    # The world keeps to the target from 1.8 on.
    assert 1.8 <= answer.best.spec.rule.scale < 2.1
    assert answer.nearest is None


def test_the_cut_with_the_better_utility_wins() -> None:
    answer = search(
        [spec(4.0, lower=1), spec(0.2, lower=1), spec(4.0), spec(0.2)], 0.1, PLAN, world
    )
    assert answer.best is not None
    assert answer.best.spec.lower == 1


def test_where_no_scale_of_the_grid_suffices_it_grows() -> None:
    answer = search([spec(0.1)], 0.1, PLAN, world)
    assert answer.best is not None
    assert answer.best.recovery is not None
    assert answer.best.recovery <= 0.1


def test_a_mechanism_whose_noise_falls_with_the_scale_is_searched_downwards() -> None:
    answer = search([spec(10.0, "metric_dp")], 0.1, PLAN, world)
    assert answer.best is not None
    assert answer.best.spec.rule.scale == pytest.approx(1 / 1.8, rel=0.15)


def test_no_more_settings_are_tried_than_allowed_and_none_twice() -> None:
    plan = replace_trials(5)
    answer = search([spec(0.1), spec(0.2), spec(0.2)], 0.1, plan, world)
    assert answer.is_exhausted
    assert len(answer.tried) == 5
    assert len({one.spec for one in answer.tried}) == 5


def replace_trials(max_trials: int) -> SearchPlan:
    return SearchPlan(max_trials=max_trials)


def test_where_nothing_keeps_to_the_target_the_least_recovery_is_named() -> None:
    def leaky(tried_spec: TrialSpec) -> Tried:
        return replace(world(tried_spec), recovery=0.5 + 0.1 / tried_spec.lower)

    answer = search([spec(None, "none", lower=1), spec(None, "none")], 0.1, PLAN, leaky)
    assert answer.best is None
    assert answer.nearest is not None
    assert answer.nearest.spec.lower == 2


def test_a_setting_that_no_attack_could_judge_is_no_answer() -> None:
    answer = search([spec(1.0)], 0.1, PLAN, lambda s: Tried(spec=s, recovery=None, utility=0.9))
    assert answer.best is None
    assert answer.nearest is None
