"""Matching the smashed data finds inputs that make it."""

from dataclasses import replace
from pathlib import Path

from cutlayer.audit.attack import Effort
from cutlayer.audit.attacks.smashed_data_matching import SmashedDataMatching
from cutlayer.privacy.mechanism import MECHANISMS
from tests.audit_worlds import World, random_rows, same_norm_noise, tiny_world


def _recovery(world: World) -> float:
    guesses = SmashedDataMatching().reconstruct(world.evidence, world.knowledge, Effort(seconds=60))
    return world.recovery([guess.tokens for guess in guesses])


def test_without_noise_most_tokens_are_found(tmp_path: Path) -> None:
    assert _recovery(tiny_world(tmp_path, random_rows(3, 8))) > 0.6


def test_little_noise_hides_little(tmp_path: Path) -> None:
    world = tiny_world(
        tmp_path, random_rows(3, 8), rule=MECHANISMS.make("clipped_gaussian", 0.02, 0.5)
    )
    assert _recovery(world) > 0.4


def test_noise_of_the_same_norm_gives_no_more_than_chance(tmp_path: Path) -> None:
    world = tiny_world(tmp_path, random_rows(3, 8), rule=MECHANISMS.make("gaussian", 0.05))
    assert _recovery(replace(world, evidence=same_norm_noise(world.evidence))) < 0.1


def test_without_time_it_says_so(tmp_path: Path) -> None:
    world = tiny_world(tmp_path)
    guesses = SmashedDataMatching().reconstruct(world.evidence, world.knowledge, Effort(seconds=0))
    assert [guess.num_unfinished for guess in guesses] == [len(row) for row in world.tokens]
