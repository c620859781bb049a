"""The learned inverter on tiny models: what it recovers, with and without vectors in its way."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from cutlayer.audit.attacks.learned_inverter import LearnedInverter
from cutlayer.audit.attacks.published_decoder import PublishedDecoder
from cutlayer.audit.inverter_data import fitted_pattern
from cutlayer.errors import ConfigError
from cutlayer.model.partition import Cut
from tests.audit_worlds import World, random_rows, same_norm_noise, tiny_knowledge, world_of
from tests.unit.audit.attacks.steps import steps

NUM_STEPS = 40


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """Eight rows at p = 1, and 150 public rows."""
    knowledge = tiny_knowledge(tmp_path_factory.mktemp("model"), cut=Cut(1, 3))
    knowledge = replace(knowledge, public_rows=random_rows(150, 12, seed=3))
    return world_of(knowledge, random_rows(8, 10), with_gradients=False)


def recovery(world: World, attack: LearnedInverter | PublishedDecoder) -> float:
    guesses = attack.reconstruct(world.evidence, world.knowledge, steps(NUM_STEPS))
    assert [guess.number for guess in guesses] == list(range(len(world.tokens)))
    return world.recovery([guess.tokens for guess in guesses])


def test_it_reads_far_more_than_the_published_decoder(world: World) -> None:
    assert recovery(world, LearnedInverter()) > 0.35
    assert recovery(world, PublishedDecoder()) < 0.1


def test_the_embedding_alone_is_read_whole(tmp_path: Path) -> None:
    knowledge = tiny_knowledge(tmp_path, cut=Cut(0, 3))
    knowledge = replace(knowledge, public_rows=random_rows(100, 12, seed=3))
    world = world_of(knowledge, random_rows(4, 10), with_gradients=False)
    assert recovery(world, LearnedInverter()) > 0.95


def test_the_same_seed_gives_the_same_guesses(world: World) -> None:
    first, second = (
        LearnedInverter().reconstruct(world.evidence, world.knowledge, steps(20, seed=7))
        for _ in range(2)
    )
    assert first == second


def test_noise_of_the_same_norm_gives_nothing_away(world: World) -> None:
    blind = replace(world, evidence=same_norm_noise(world.evidence))
    assert recovery(blind, LearnedInverter()) < 0.06


def test_places_left_empty_do_not_spoil_the_others(world: World) -> None:
    hidden = torch.zeros(20, dtype=torch.bool)
    hidden[2:5] = True
    observations = tuple(
        replace(seen, h_LD=seen.h_LD.masked_fill(hidden[: len(seen.h_LD), None], 0.0))
        for seen in world.evidence.observations
    )
    evidence = replace(world.evidence, observations=observations)
    guesses = LearnedInverter().reconstruct(evidence, world.knowledge, steps(NUM_STEPS))
    pairs = [
        (guessed, token)
        for guess, tokens in zip(guesses, world.tokens, strict=True)
        for guessed, token in zip(guess.tokens[5:], tokens[5:], strict=True)
    ]
    assert sum(guessed == token for guessed, token in pairs) > 0.25 * len(pairs)
    assert all(token >= 0 for guess in guesses for token in guess.tokens[2:5])


def test_a_withheld_pattern_keeps_both_ends_on_another_row() -> None:
    pattern = torch.tensor([False, True, True, False, False])
    assert fitted_pattern(pattern, 7).tolist() == [False, True, True, True, True, False, False]
    assert fitted_pattern(pattern, 4).tolist() == [False, True, False, False]
    assert len(fitted_pattern(pattern, 2)) == 2
    assert not fitted_pattern(torch.zeros(3, dtype=torch.bool), 5).any()


def test_without_public_rows_it_says_what_is_missing(world: World) -> None:
    knowledge = replace(world.knowledge, public_rows=())
    with pytest.raises(ConfigError, match="no public rows"):
        LearnedInverter().reconstruct(world.evidence, knowledge, steps(1))
