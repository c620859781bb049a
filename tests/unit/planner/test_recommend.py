"""The front and the choices follow from the numbers, and say what is only assumed."""

from cutlayer.model.partition import Cut
from cutlayer.planner.plan import CutPlan
from cutlayer.planner.recommend import Choice, Goal, pareto_front, recommend
from tests.unit.planner.plans import made_up


def _choices(plans: list[CutPlan]) -> dict[Goal, Choice]:
    return {choice.goal: choice for choice in recommend(plans)}


def test_a_cut_that_another_beats_is_not_on_the_front() -> None:
    good = made_up(Cut(2, 6), memory=1.0, seconds=1.0)
    worse = made_up(Cut(1, 7), memory=1.1, seconds=1.0)
    deeper = made_up(Cut(3, 5), memory=2.0, seconds=2.0)
    assert pareto_front([good, worse, deeper]) == [good, deeper]


def test_a_measured_leak_counts_before_depth() -> None:
    shallow = made_up(Cut(1, 7), memory=1.0, leak=0.1)
    deep = made_up(Cut(3, 5), memory=2.0, leak=0.4)
    assert pareto_front([shallow, deep]) == [shallow]
    assert _choices([shallow, deep])[Goal.MOST_PRIVATE].plan is shallow


def test_each_goal_gets_its_cut() -> None:
    plans = [
        made_up(Cut(0, 8), memory=0.5, seconds=1.0),
        made_up(Cut(2, 7), memory=0.9, seconds=0.8),
        made_up(Cut(2, 6), memory=1.0, seconds=1.2),
        made_up(Cut(3, 5), memory=4.0, seconds=6.0),
    ]
    found = _choices(plans)
    assert found[Goal.LEAST_MEMORY].plan.cut == Cut(0, 8)
    assert found[Goal.FASTEST].plan.cut == Cut(2, 7)
    assert found[Goal.MOST_PRIVATE].plan.cut == Cut(3, 5)
    assert found[Goal.BALANCED].plan.cut in (Cut(2, 7), Cut(2, 6))
    assert all(choice.reason.endswith(".") for choice in found.values())


def test_without_an_audit_the_reason_says_that_depth_is_an_assumption() -> None:
    reason = _choices([made_up(Cut(2, 6))])[Goal.MOST_PRIVATE].reason
    assert "no audit" in reason
    assert "assumption" in reason


def test_embedding_rows_are_never_the_balanced_choice_while_another_is_feasible() -> None:
    bare, deep = made_up(Cut(0, 8), memory=0.1, seconds=0.1), made_up(Cut(1, 7), memory=9.0)
    assert _choices([bare, deep])[Goal.BALANCED].plan is deep
    assert "embedding rows" in _choices([bare, deep])[Goal.LEAST_MEMORY].reason


def test_unknown_seconds_recommend_nothing_as_fastest() -> None:
    found = _choices([made_up(Cut(1, 7), seconds=None), made_up(Cut(2, 6), seconds=None)])
    assert set(found) == {Goal.MOST_PRIVATE, Goal.LEAST_MEMORY, Goal.BALANCED}
