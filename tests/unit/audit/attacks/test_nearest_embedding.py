"""The nearest row of the embedding is the token where the head has no block."""

from dataclasses import replace
from pathlib import Path

import pytest

from cutlayer.audit.attack import Effort
from cutlayer.audit.attacks.nearest_embedding import NearestEmbedding
from cutlayer.model.partition import Cut
from cutlayer.privacy.mechanism import MECHANISMS
from tests.audit_worlds import World, same_norm_noise, tiny_world

EMBEDDING_ALONE = Cut(0, 3)


def _recovery(world: World, seconds: float = 60) -> float:
    effort = Effort(seconds=seconds)
    guesses = NearestEmbedding().reconstruct(world.evidence, world.knowledge, effort)
    return world.recovery([guess.tokens for guess in guesses])


@pytest.mark.parametrize("family", ["llama", "gpt2", "granite", "gemma2"])
def test_a_head_without_blocks_gives_every_token_away(family: str, tmp_path: Path) -> None:
    assert _recovery(tiny_world(tmp_path, cut=EMBEDDING_ALONE, family=family)) == 1.0


@pytest.mark.parametrize("name", ["clipped_gaussian", "matrix_gaussian"])
def test_a_clip_is_undone(name: str, tmp_path: Path) -> None:
    rule = MECHANISMS.make(name, 0.01, 0.3)
    assert _recovery(tiny_world(tmp_path, cut=EMBEDDING_ALONE, rule=rule)) > 0.9


def test_noise_of_the_same_norm_gives_no_more_than_chance(tmp_path: Path) -> None:
    world = tiny_world(tmp_path, cut=EMBEDDING_ALONE)
    assert _recovery(replace(world, evidence=same_norm_noise(world.evidence))) < 0.1


def test_without_time_it_says_nothing(tmp_path: Path) -> None:
    assert _recovery(tiny_world(tmp_path, cut=EMBEDDING_ALONE), seconds=0.0) == 0.0
