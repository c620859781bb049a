"""The opened sum is the plain one, whoever vanishes at whichever step; or the round is refused."""

from collections.abc import Sequence
from itertools import combinations, product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cutlayer.errors import QuorumNotMet
from cutlayer.federation.settings import SecureSettings
from tests.unit.federation.secure.crowd import (
    NOBODY,
    Crowd,
    Gone,
    attempt_of,
    names,
    plain_mean,
    updates,
)

_STEPS = ("keys", "secrets", "update", "unmask")


def check_sum(crowd: Crowd, gone: Gone) -> list[str]:
    """Run, compare with the plain mean, and say who was in it."""
    sent = updates(crowd.attempt.cohort, crowd.num_values)
    mean_N, survivors = crowd.run(sent, gone)
    expected_N = plain_mean({name: sent[name] for name in survivors})
    assert float((mean_N - expected_N).abs().max()) <= 1e-6
    return survivors


@pytest.mark.parametrize("num_members", [3, 4, 7, 20, 34])
def test_sum_of_all_is_the_plain_one(num_members: int) -> None:
    cohort = names(num_members)
    assert check_sum(Crowd(attempt_of(cohort)), NOBODY) == cohort


def lost_at(cohort: list[str], when: Sequence[int]) -> dict[str, list[str]]:
    """Who vanishes before each step, from each member's step; a step beyond the last is never."""
    return {
        step: [name for name, at in zip(cohort, when, strict=True) if at == number]
        for number, step in enumerate(_STEPS)
    }


def test_every_way_to_lose_members_of_four_is_survived_or_refused() -> None:
    cohort = names(4)
    for when in product(range(5), repeat=4):
        crowd, gone = Crowd(attempt_of(cohort)), Gone(**lost_at(cohort, when))
        if sum(at == 4 for at in when) >= crowd.attempt.threshold:
            check_sum(crowd, gone)
        else:
            with pytest.raises(QuorumNotMet, match=r"of 4 members"):
                check_sum(crowd, gone)


@pytest.mark.parametrize("step", _STEPS)
@pytest.mark.parametrize("who", list(combinations(range(7), 2)))
def test_any_two_of_seven_may_vanish_at_any_step(step: str, who: tuple[int, int]) -> None:
    cohort = names(7)
    check_sum(Crowd(attempt_of(cohort)), Gone(**{step: [cohort[at] for at in who]}))


@pytest.mark.parametrize("step", _STEPS)
def test_one_more_than_the_threshold_allows_is_refused_at_every_step(step: str) -> None:
    cohort = names(7)
    with pytest.raises(QuorumNotMet, match=r"^4 of 7 members .* need 5 of their 7 holders"):
        check_sum(Crowd(attempt_of(cohort)), Gone(**{step: cohort[:3]}))


@pytest.mark.parametrize("step", _STEPS)
def test_two_members_are_never_enough(step: str) -> None:
    cohort = names(3)
    crowd = Crowd(attempt_of(cohort, SecureSettings(threshold=0.51)))
    with pytest.raises(QuorumNotMet, match=r"^2 of 3 members"):
        check_sum(crowd, Gone(**{step: cohort[:1]}))


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_losses_at_all_steps_of_a_sparse_graph_are_survived_or_refused(data: st.DataObject) -> None:
    num_members = data.draw(st.integers(3, 20))
    degree = data.draw(st.sampled_from([2, 4, 6, 8, 12]))
    share = data.draw(st.sampled_from([0.51, 0.6, 0.67, 0.8, 1.0]))
    cohort = names(num_members)
    when = data.draw(st.lists(st.integers(0, 24), min_size=num_members, max_size=num_members))
    lost = lost_at(cohort, when)
    crowd = Crowd(attempt_of(cohort, SecureSettings(threshold=share, neighbours=degree)))
    try:
        check_sum(crowd, Gone(**lost))
    except QuorumNotMet:
        if not any(lost.values()):
            raise


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_any_finite_values_and_weights_give_the_clipped_mean(data: st.DataObject) -> None:
    number = st.floats(-20, 20, width=32)
    cohort = names(3)
    sent = {
        name: (
            torch.tensor(data.draw(st.lists(number, min_size=5, max_size=5))),
            data.draw(st.integers(1, 1 << 20)),
        )
        for name in cohort
    }
    mean_N, _ = Crowd(attempt_of(cohort)).run(sent)
    clipped = {name: (values.clamp(-16, 16), weight) for name, (values, weight) in sent.items()}
    assert float((mean_N - plain_mean(clipped)).abs().max()) <= 1e-6


def test_a_member_without_rows_changes_nothing() -> None:
    cohort = names(4)
    sent = updates(cohort)
    sent["owner2"] = (torch.full((5,), 3.0), 0)
    mean_N, survivors = Crowd(attempt_of(cohort)).run(sent)
    assert survivors == cohort
    assert float((mean_N - plain_mean(sent)).abs().max()) <= 1e-6


def test_the_sum_opens_as_soon_as_enough_answered() -> None:
    cohort = names(7)
    crowd, sent = Crowd(attempt_of(cohort)), updates(cohort)
    survivors = crowd.send_updates(crowd.send_secrets(crowd.send_keys()), sent)
    for number, name in enumerate(survivors, start=1):
        crowd.unmask([name])
        assert crowd.server.is_openable() == (number >= 5)
        assert crowd.server.missing() == tuple(survivors[number:])
    assert crowd.server.survivors == tuple(survivors)
