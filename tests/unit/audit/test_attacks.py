"""Every registered attack: what holds for all of them, whatever they do."""

from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

import cutlayer.audit.attacks
from cutlayer.audit.attack import ATTACKS, Aim, Effort, Guess
from cutlayer.audit.evidence import Evidence
from cutlayer.audit.scoring import Score, Scorer
from cutlayer.audit.truth import Hidden
from cutlayer.errors import ConfigError
from cutlayer.model.partition import Cut
from cutlayer.privacy.mechanism import Gaussian
from tests.audit_worlds import (
    World,
    random_rows,
    same_norm_noise,
    tiny_knowledge,
    update_of,
    world_of,
)

assert cutlayer.audit.attacks

CUTS = {"nearest_embedding": Cut(0, 3)}
"""Attacks that need a cut of their own."""
NO_EVIDENCE = {"language_prior"}
"""Attacks that look at nothing that left."""
PLANTED = {"canary_extraction"}
"""Attacks on canaries, which have tests of their own."""


@dataclass
class Clock:
    """Each look at it takes as long."""

    tick_s: float
    now_s: float = 0.0
    num_looks: int = 0

    def __call__(self) -> float:
        self.num_looks += 1
        self.now_s += self.tick_s
        return self.now_s


def effort(clock: Clock | None = None, seed: int = 0) -> Effort:
    return Effort(seconds=100.0, seed=seed, clock_s=clock or Clock(tick_s=1.0))


def hidden(world: World) -> dict[int, Hidden]:
    columns = zip(world.tokens, world.labels, world.private, strict=True)
    return {
        n: Hidden(tokens=tokens, labels=labels, private=private)
        for n, (tokens, labels, private) in enumerate(columns)
    }


def score(name: str, world: World, guesses: list[Guess]) -> Score:
    aim, rows = ATTACKS.make(name).aim, hidden(world)
    scorer = Scorer(public_rows=world.knowledge.public_rows, vocab_size=264)
    if aim is Aim.BAG:
        tokens = tuple(token for row in rows.values() for token in row.tokens)
        return scorer.score(aim, guesses, {1: Hidden(tokens=tokens)})
    return scorer.score(aim, guesses, rows)


def run(name: str, world: World, how: Effort | None = None) -> list[Guess]:
    attack = ATTACKS.make(name)
    return attack.reconstruct(world.evidence, world.knowledge, how or effort())


@pytest.fixture(scope="module", params=[n for n in ATTACKS.names if n not in PLANTED])
def name(request: pytest.FixtureRequest) -> str:
    """Each attack in turn."""
    assert isinstance(request.param, str)
    return request.param


@pytest.fixture(scope="module")
def world(name: str, tmp_path_factory: pytest.TempPathFactory) -> World:
    """Rows that left twice with a little noise, gradients at both cuts and a plain update."""
    folder = tmp_path_factory.mktemp(name)
    rule = Gaussian(0.01)
    knowledge = tiny_knowledge(folder, rule, cut=CUTS.get(name, Cut(1, 3)))
    rows = random_rows(4, 6)
    made = world_of(knowledge, rows, num_epochs=2)
    # Fewer tokens than the rank: an update tells of no more.
    update = update_of(knowledge, rows[:1], made.labels[:1], rank=32)
    return replace(made, evidence=replace(made.evidence, updates=(update,)))


@dataclass(frozen=True, kw_only=True)
class Done:
    """One run, which several tests look at: attacks are slow."""

    guesses: list[Guess]
    told: list[float]
    num_looks: int


@pytest.fixture(scope="module")
def done(name: str, world: World) -> Done:
    """The attack with time enough."""
    told: list[float] = []
    clock = Clock(tick_s=0.25)
    guesses = run(name, world, replace(effort(clock), on_progress=told.append))
    return Done(guesses=guesses, told=told, num_looks=clock.num_looks)


def test_guesses_fit_their_observations(name: str, world: World, done: Done) -> None:
    guesses, aim = done.guesses, ATTACKS.make(name).aim
    numbers = [guess.number for guess in guesses]
    assert len(numbers) == len(set(numbers))
    vocabulary = world.knowledge.embedding_VD.shape[0]
    for guess in guesses:
        assert len(guess.tokens) == len(guess.confidences)
        assert all(-1 <= token < vocabulary for token in guess.tokens)
        assert all(0 <= share <= 1 for share in guess.confidences)
        if aim is not Aim.BAG:
            assert len(guess.tokens) == len(world.tokens[guess.number])
        assert str(guess.tokens) not in repr(guess), "a guess is never printed by accident"


def test_the_same_seed_gives_the_same_guesses(name: str, world: World) -> None:
    first, again = (run(name, world, effort(Clock(tick_s=5.0))) for _ in range(2))
    assert first == again


def test_an_attack_stops_when_its_time_is_up(name: str, world: World, done: Done) -> None:
    hurried = Clock(tick_s=60.0)
    cut_short = run(name, world, effort(hurried))
    assert hurried.num_looks <= done.num_looks
    # Every observation takes a look or two to be given up, and a few come before the first.
    assert hurried.num_looks <= 10 + 3 * len(world.evidence.observations)
    assert {guess.number for guess in cut_short} <= {guess.number for guess in done.guesses}
    if ATTACKS.make(name).aim is not Aim.BAG:
        assert any(guess.num_unfinished for guess in cut_short), "an end before its time is said"


def test_the_way_to_the_end_is_told(done: Done) -> None:
    assert done.told
    assert done.told == sorted(done.told)
    assert 0 <= done.told[0] <= done.told[-1] <= 1


def test_it_finds_more_than_chance_where_there_is_little_noise(
    name: str, world: World, done: Done
) -> None:
    if name in NO_EVIDENCE | {"published_decoder"}:
        pytest.skip("looks at nothing, or at the wrong token")
    got = score(name, world, done.guesses)
    assert got.recovery.value > got.chance + 3 * got.chance_error


def test_noise_of_the_same_norm_leaves_it_at_chance(name: str, world: World) -> None:
    """An attack that still finds something would have it from somewhere else: it cheats."""
    noise = replace(world, evidence=same_norm_noise(world.evidence))
    got = score(name, noise, run(name, noise))
    assert got.is_chance, f"{got.recovery} where {got.chance} +- {got.chance_error} is chance"


def test_what_it_cannot_use_is_an_error_or_nothing_is_said(name: str, world: World) -> None:
    bare = [
        replace(seen, y_LD=None, gradient_LD=None, input_gradient_LD=None)
        for seen in world.evidence.observations
    ]
    without_replies = Evidence(observations=tuple(bare))
    updates_alone = Evidence(observations=(), updates=world.evidence.updates)
    for evidence in (without_replies, updates_alone, Evidence(observations=())):
        numbers = {seen.number for seen in evidence.observations}
        known = numbers | {update.round for update in evidence.updates}
        # Any error but ConfigError fails the test.
        with suppress(ConfigError):
            bare_world = replace(world, evidence=evidence)
            guesses = run(name, bare_world, effort(Clock(tick_s=20.0)))
            assert {guess.number for guess in guesses} <= known


def test_a_session_without_gradients_is_no_ground_for_a_gradient_attack(
    name: str, world: World
) -> None:
    if ATTACKS.make(name).aim is not Aim.LABELS:
        pytest.skip("needs no gradient")
    bare = [replace(seen, gradient_LD=None) for seen in world.evidence.observations]
    with pytest.raises(ConfigError, match="gradient"):
        run(name, replace(world, evidence=Evidence(observations=tuple(bare))))


def test_it_says_where_it_comes_from(name: str) -> None:
    about = ATTACKS.make(name).about
    assert 20 < len(about) < 120
    assert "\n" not in about


def test_an_unknown_attack_names_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"'magic' is unknown.*language_prior"):
        ATTACKS.make("magic")
