"""Averaging removes fresh noise, gains nothing from replays, and survives a head that trains."""

from dataclasses import replace
from pathlib import Path

import torch

from cutlayer.audit.attack import Effort
from cutlayer.audit.attacks.repeat_averaging import RepeatAveraging
from cutlayer.audit.attacks.vocabulary_matching import VocabularyMatching
from cutlayer.audit.chains import chains
from cutlayer.audit.evidence import Evidence
from cutlayer.audit.links import link
from cutlayer.privacy.mechanism import MECHANISMS
from tests.audit_worlds import World, same_norm_noise, tiny_world

NUM_EPOCHS = 16
SCALE = 0.5


def _world(tmp_path: Path) -> World:
    rule = MECHANISMS.make("gaussian", SCALE)
    return tiny_world(tmp_path, rule=rule, num_epochs=NUM_EPOCHS)


def _averaged(world: World) -> float:
    guesses = RepeatAveraging().reconstruct(world.evidence, world.knowledge, Effort(seconds=120))
    ordered = sorted(guesses, key=lambda guess: guess.number)
    return world.recovery([guess.tokens for guess in ordered])


def _first_epoch(world: World) -> World:
    number = len(world.tokens) // NUM_EPOCHS
    return replace(
        world,
        evidence=Evidence(observations=world.evidence.observations[:number]),
        tokens=world.tokens[:number],
        labels=world.labels[:number],
        private=world.private[:number],
    )


def _one_epoch(world: World) -> float:
    first = _first_epoch(world)
    guesses = VocabularyMatching().reconstruct(first.evidence, world.knowledge, Effort(seconds=60))
    return first.recovery([guess.tokens for guess in guesses])


def test_fresh_noise_averages_out(tmp_path: Path) -> None:
    world = _world(tmp_path)
    assert _averaged(world) > _one_epoch(world) + 0.2


def test_replayed_noise_gains_nothing(tmp_path: Path) -> None:
    world = _world(tmp_path)
    first = world.evidence.observations[: len(world.tokens) // NUM_EPOCHS]
    replayed = tuple(
        replace(seen, h_LD=first[index % len(first)].h_LD)
        for index, seen in enumerate(world.evidence.observations)
    )
    again = replace(world, evidence=Evidence(observations=replayed))
    assert abs(_averaged(again) - _one_epoch(world)) < 0.05


def test_a_head_that_moves_a_little_is_averaged_too(tmp_path: Path) -> None:
    world = _world(tmp_path)
    generator = torch.Generator().manual_seed(0)
    drift_D = 0.02 * torch.randn(world.knowledge.embedding_VD.shape[1], generator=generator)
    moved = tuple(
        replace(seen, h_LD=seen.h_LD + drift_D * seen.step / NUM_EPOCHS)
        for seen in world.evidence.observations
    )
    training = replace(world, evidence=Evidence(observations=moved))
    assert _averaged(training) > _one_epoch(world) + 0.2


def test_noise_of_the_same_norm_gives_no_more_than_chance(tmp_path: Path) -> None:
    world = tiny_world(tmp_path, rule=MECHANISMS.make("gaussian", SCALE), num_epochs=3)
    assert _averaged(replace(world, evidence=same_norm_noise(world.evidence))) < 0.1


def test_rows_are_linked_with_themselves_alone(tmp_path: Path) -> None:
    rows = [[token] * 8 + [9] for token in (3, 50, 120)]
    rule = MECHANISMS.make("gaussian", 0.02)
    world = tiny_world(tmp_path, rows=rows, rule=rule, num_epochs=3)
    groups = link(chains(world.evidence.observations), rule.sigma**2, 0.02)
    numbers = [[chain.pieces[0].number for chain in group.chains] for group in groups]
    assert numbers == [[0, 3, 6], [1, 4, 7], [2, 5, 8]]
