"""Vocabulary matching finds what was sent, and says when it had no time to."""

import itertools
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from cutlayer.audit.attack import ATTACKS, Effort, Guess
from cutlayer.audit.attacks.vocabulary_matching import VocabularyMatching
from cutlayer.audit.evidence import Evidence
from cutlayer.model.partition import Cut, Head, Tail
from cutlayer.privacy.mechanism import MECHANISMS
from tests.audit_worlds import (
    SENTENCES,
    World,
    same_norm_noise,
    smollm2_knowledge,
    text_rows,
    tiny_knowledge,
    tiny_world,
)
from tests.audit_worlds import world_of as made


def _guesses(world: World, seconds: float = 60) -> list[Guess]:
    effort = Effort(seconds=seconds)
    return VocabularyMatching().reconstruct(world.evidence, world.knowledge, effort)


def _guesses_at(world: World, share: float) -> list[Guess]:
    """When so much of its time is gone before the first row."""
    looks = itertools.count()
    effort = Effort(seconds=10.0, clock_s=lambda: 10.0 * share if next(looks) > 15 else 0.0)
    return VocabularyMatching().reconstruct(world.evidence, world.knowledge, effort)


def _recovery(world: World) -> float:
    return world.recovery([guess.tokens for guess in _guesses(world)])


@pytest.mark.parametrize("lower", [0, 1, 2])
def test_without_noise_every_token_is_found(lower: int, tmp_path: Path) -> None:
    assert _recovery(tiny_world(tmp_path, cut=Cut(lower, 3))) == 1.0


@pytest.mark.parametrize("family", ["gemma2", "gpt2", "granite"])
def test_other_families_give_their_tokens_away_too(family: str, tmp_path: Path) -> None:
    assert _recovery(tiny_world(tmp_path, family=family)) == 1.0


@pytest.mark.parametrize(
    ("name", "scale", "clip"),
    [
        ("gaussian", 0.05, None),
        ("clipped_gaussian", 0.05, 0.5),
        ("matrix_gaussian", 0.02, 2.0),
        ("metric_dp", 500.0, 0.5),
    ],
)
def test_little_noise_hides_little(
    name: str, scale: float, clip: float | None, tmp_path: Path
) -> None:
    world = tiny_world(tmp_path, rule=MECHANISMS.make(name, scale, clip))
    assert _recovery(world) > 0.9


def test_noise_of_the_same_norm_gives_no_more_than_chance(tmp_path: Path) -> None:
    world = tiny_world(tmp_path, rule=MECHANISMS.make("gaussian", 0.05))
    noise = replace(world, evidence=same_norm_noise(world.evidence))
    assert _recovery(noise) < 0.1


def test_adapters_of_a_colluding_client_are_used(tmp_path: Path) -> None:
    def adapt(head: Head, tail: Tail) -> None:
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for weight in head.base.parameters():
                if weight.ndim == 2:
                    weight.add_(torch.randn(weight.shape, generator=generator) * 0.3)

    colluding = replace(tiny_knowledge(tmp_path), adapt=adapt)
    world = made(colluding, [[5, 77, 8, 200, 13, 9, 44, 120]])
    assert _recovery(world) == 1.0
    assert _recovery(replace(world, knowledge=tiny_knowledge(tmp_path / "plain"))) < 1.0


def test_a_replay_is_found_once(tmp_path: Path) -> None:
    world = tiny_world(tmp_path)
    seen = world.evidence.observations[0]
    twice = Evidence(observations=(seen, replace(seen, number=1)))
    first, second = _guesses(replace(world, evidence=twice))
    assert second.tokens == first.tokens == world.tokens[0]


def test_withheld_vectors_do_not_spoil_the_others(tmp_path: Path) -> None:
    world = tiny_world(tmp_path)
    seen = world.evidence.observations[0]
    h_LD = seen.h_LD.clone()
    h_LD[3] = 0
    evidence = Evidence(observations=(replace(seen, h_LD=h_LD),))
    guess = _guesses(replace(world, evidence=evidence))[0]
    truth = world.tokens[0]
    assert [a == b for a, b in zip(guess.tokens, truth, strict=True)].count(False) <= 2


def test_pieces_of_a_conversation_are_one_row(tmp_path: Path) -> None:
    world = tiny_world(tmp_path)
    whole = replace(world.evidence.observations[0], phase="generation", step=0)
    pieces = (
        replace(whole, h_LD=whole.h_LD[:5]),
        replace(whole, h_LD=whole.h_LD[5:6], start=5, number=1),
        replace(whole, h_LD=whole.h_LD[6:], start=6, number=2),
    )
    guesses = _guesses(replace(world, evidence=Evidence(observations=pieces)))
    assert [len(guess.tokens) for guess in guesses] == [5, 1, 2]
    assert sum((guess.tokens for guess in guesses), ()) == world.tokens[0]


def test_a_template_is_filled_in_but_not_against_the_evidence(tmp_path: Path) -> None:
    world = tiny_world(tmp_path)
    for template in (world.tokens[0][-2:], (1, 2)):
        told = replace(world.knowledge, template=template)
        evidence = Evidence(observations=world.evidence.observations[:1])
        guess = _guesses(replace(world, knowledge=told, evidence=evidence))[0]
        assert guess.tokens == world.tokens[0]


def test_without_time_each_vector_is_guessed_alone(tmp_path: Path) -> None:
    world = tiny_world(tmp_path)
    guesses = _guesses_at(world, 1.2)
    assert [guess.num_unfinished for guess in guesses] == [len(row) for row in world.tokens]
    assert world.recovery([guess.tokens for guess in guesses]) > 0.05


def test_far_too_late_nothing_is_said(tmp_path: Path) -> None:
    world = tiny_world(tmp_path)
    guesses = _guesses_at(world, 1.6)
    assert [guess.num_unfinished for guess in guesses] == [len(row) for row in world.tokens]
    assert {token for guess in guesses for token in guess.tokens} == {-1}


def test_progress_reaches_one(tmp_path: Path) -> None:
    shares: list[float] = []
    world = tiny_world(tmp_path)
    effort = Effort(seconds=30, on_progress=shares.append)
    ATTACKS.make("vocabulary_matching").reconstruct(world.evidence, world.knowledge, effort)
    assert shares == sorted(shares)
    assert shares[-1] == 1.0


def test_the_published_noise_hides_nothing_of_real_text() -> None:
    knowledge = smollm2_knowledge(MECHANISMS.make("gaussian", 0.02))
    rows = [row[:8] for row in text_rows(knowledge, SENTENCES[:1])]
    world = made(knowledge, rows, with_gradients=False)
    assert _recovery(world) == 1.0
