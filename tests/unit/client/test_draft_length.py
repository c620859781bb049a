"""The controller in simulated rounds: what it wins, and how little it can lose."""

import itertools
import random
from collections.abc import Callable
from statistics import mean, median

import pytest

from cutlayer.client.draft_length import DraftLength, RoundCost

MAX_TOKENS = 8
PLAIN_S = {"loopback": 0.010, "slow core": 0.010, "link": 0.060}
GUESS_S = {"loopback": 0.002, "slow core": 0.005, "link": 0.002}
WORLDS = list(PLAIN_S)


class Run:
    """One reply of so many tokens in simulated seconds."""

    def __init__(
        self,
        world: str,
        acceptance: Callable[[int], float],
        num_tokens: int,
        *,
        seed: int = 0,
        fixed: int | None = None,
        proposing: float = 1.0,
        length: DraftLength | None = None,
    ) -> None:
        draws = random.Random(seed)
        controller = DraftLength(MAX_TOKENS) if length is None else length
        self.seconds, self.drafted = 0.0, list[int]()
        made = 0
        while made < num_tokens:
            wanted = controller.next() if fixed is None else fixed
            assert 0 <= wanted <= MAX_TOKENS
            num_drafted = min(wanted, num_tokens - made - 1) * (draws.random() < proposing)
            accepted = 0
            while accepted < num_drafted and draws.random() < acceptance(made):
                accepted += 1
            jitter = 1 + 0.05 * draws.gauss(0, 1)
            took_s = (PLAIN_S[world] + GUESS_S[world] * num_drafted) * jitter
            controller.observe(num_drafted, accepted, took_s)
            self.seconds += took_s
            made += accepted + 1
            self.drafted.append(num_drafted)
        self.gain = num_tokens * PLAIN_S[world] / self.seconds
        """Speed against plain decoding."""


def mean_gain(world: str, acceptance: float, num_tokens: int, fixed: int | None = None) -> float:
    return mean(
        Run(world, lambda _: acceptance, num_tokens, seed=seed, fixed=fixed).gain
        for seed in range(20)
    )


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("acceptance", [0.0, 0.05])
def test_free_text_keeps_95_percent_of_plain_speed(world: str, acceptance: float) -> None:
    assert mean_gain(world, acceptance, 128) >= 0.95


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("num_tokens", [128, 1000])
@pytest.mark.parametrize("acceptance", [0.7, 0.9, 0.98])
def test_text_that_repeats_comes_near_the_best_fixed_number(
    world: str, num_tokens: int, acceptance: float
) -> None:
    best = max(mean_gain(world, acceptance, num_tokens, fixed) for fixed in (1, 2, 4, 6, 8))
    assert mean_gain(world, acceptance, num_tokens) >= 0.9 * best


def test_a_link_gains_most_from_a_text_that_repeats() -> None:
    assert mean_gain("link", 0.9, 128) > 4.0


@pytest.mark.parametrize("acceptance", [0.0, 0.5, 0.9])
def test_guesses_that_cost_a_round_each_are_given_up(acceptance: float) -> None:
    rounds = Run("loopback", lambda _: acceptance, 1)
    assert rounds.drafted == [0]
    controller = DraftLength(MAX_TOKENS)
    lost_s, draws = 0.0, random.Random(1)
    for _ in range(500):
        num_drafted = controller.next()
        accepted = 0
        while accepted < num_drafted and draws.random() < acceptance:
            accepted += 1
        took_s = 0.01 * (1 + 1.5 * num_drafted)
        controller.observe(num_drafted, accepted, took_s)
        lost_s += took_s - 0.01 * (1 + accepted)
    assert lost_s < 0.05 * 500 * 0.01


@pytest.mark.parametrize("world", WORLDS)
def test_it_turns_soon_when_the_text_begins_to_repeat(world: str) -> None:
    turns = []
    for seed in range(15):
        controller = DraftLength(MAX_TOKENS)
        Run(world, lambda _: 0.02, 400, seed=seed, length=controller)
        rounds = Run(world, lambda _: 0.97, 300, seed=100 + seed, length=controller).drafted
        turns.append(next(number for number, drafted in enumerate(rounds) if drafted >= 3))
    # The dearer a probe, the more seldom it may come.
    assert median(turns) <= {"link": 6, "loopback": 35, "slow core": 80}[world]


@pytest.mark.parametrize("world", WORLDS)
def test_what_was_won_is_not_lost_again_when_the_text_stops_repeating(world: str) -> None:
    controller = DraftLength(MAX_TOKENS)
    Run(world, lambda _: 0.97, 400, length=controller)
    assert Run(world, lambda _: 0.0, 200, length=controller).gain >= 0.93


@pytest.mark.parametrize("world", WORLDS)
def test_a_drafter_that_is_seldom_able_to_guess_still_pays(world: str) -> None:
    gains = [Run(world, lambda _: 0.95, 400, seed=seed, proposing=0.3).gain for seed in range(10)]
    assert mean(gains) > 1.2


def test_rounds_without_guesses_are_timed_again_and_again() -> None:
    rounds = Run("link", lambda _: 1.0, 4000).drafted
    gaps = [number for number, drafted in enumerate(rounds) if drafted == 0]
    assert max(b - a for a, b in itertools.pairwise(gaps)) <= 66


def test_one_long_round_changes_no_minds() -> None:
    controller = DraftLength(MAX_TOKENS)
    Run("link", lambda _: 0.9, 400, length=controller)
    before = controller.next()
    controller.observe(before, before, 30.0)
    assert controller.next() >= before // 2 > 0


def test_streams_share_what_rounds_cost() -> None:
    cost = RoundCost()
    Run("slow core", lambda _: 0.9, 400, length=DraftLength(MAX_TOKENS, cost))
    assert cost.seconds(0) == pytest.approx(PLAIN_S["slow core"], rel=0.2)
    assert cost.seconds(4) - cost.seconds(0) == pytest.approx(0.02, rel=0.4)
    cost.observe(0, PLAIN_S["slow core"])
    assert DraftLength(MAX_TOKENS, cost).next() > 0


@pytest.mark.parametrize("max_tokens", [1, 64])
def test_it_never_asks_for_more_than_allowed(max_tokens: int) -> None:
    controller = DraftLength(max_tokens)
    for _ in range(300):
        num_drafted = controller.next()
        assert 0 <= num_drafted <= max_tokens
        controller.observe(num_drafted, num_drafted, 0.05)
    assert controller.next() in (0, max_tokens)


def test_rounds_that_take_no_time_are_no_error() -> None:
    controller = DraftLength(MAX_TOKENS)
    for _ in range(20):
        controller.observe(controller.next(), 0, 0.0)
    assert controller.next() >= 0


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("acceptance", [0.0, 0.9])
def test_a_first_round_that_carried_a_prompt_does_not_mislead(
    world: str, acceptance: float
) -> None:
    gains = []
    for seed in range(20):
        controller = DraftLength(MAX_TOKENS)
        controller.observe(0, 0, 12 * PLAIN_S[world])
        gains.append(Run(world, lambda _: acceptance, 128, seed=seed, length=controller).gain)
    best = mean_gain(world, acceptance, 128)
    assert mean(gains) >= 0.95 * best


def test_many_streams_guess_less_where_a_guess_costs_time() -> None:
    cost = RoundCost()
    controller = DraftLength(MAX_TOKENS, cost)
    Run("loopback", lambda _: 1.0, 400, length=controller)
    cost.observe(0, PLAIN_S["loopback"])
    assert controller.next() > 3
    assert controller.next(num_streams=16) <= min(2, controller.next(num_streams=4))
