"""BiSR's backward attack on tiny models."""

from dataclasses import replace
from pathlib import Path

import pytest

from cutlayer.audit.attacks.bisr_b import BisrB
from cutlayer.audit.attacks.learned_inverter import LearnedInverter
from cutlayer.errors import ConfigError
from cutlayer.model.partition import Cut
from tests.audit_worlds import World, random_rows, tiny_knowledge, world_of
from tests.unit.audit.attacks.steps import steps


def half_scored_world(folder: Path) -> World:
    """Two rows whose second half is scored; the inverter sees 60 public rows."""
    knowledge = tiny_knowledge(folder, cut=Cut(1, 3))
    knowledge = replace(knowledge, public_rows=random_rows(60, 12, seed=3))
    rows = random_rows(2, 8)
    labels = [[-100] * (len(row) // 2) + row[len(row) // 2 :] for row in rows]
    return world_of(knowledge, rows, labels)


def test_both_directions_read_more_than_the_inverter_alone(tmp_path: Path) -> None:
    world = half_scored_world(tmp_path)
    forward = LearnedInverter().reconstruct(world.evidence, world.knowledge, steps(30))
    both = BisrB().reconstruct(world.evidence, world.knowledge, steps(280))
    for guess, labels in zip(both, world.labels, strict=True):
        scored = [(g, label) for g, label in zip(guess.tokens, labels, strict=True) if label >= 0]
        assert sum(g == label for g, label in scored) >= len(scored) - 1
        assert min(guess.tokens) >= 0
    alone = world.recovery([guess.tokens for guess in forward])
    assert world.recovery([guess.tokens for guess in both]) > alone


def test_without_gradients_it_says_so_before_it_learns(tmp_path: Path) -> None:
    knowledge = tiny_knowledge(tmp_path)
    world = world_of(knowledge, random_rows(1, 8), with_gradients=False)
    with pytest.raises(ConfigError, match="no gradient"):
        BisrB().reconstruct(world.evidence, replace(knowledge, public_rows=()), steps(1))
