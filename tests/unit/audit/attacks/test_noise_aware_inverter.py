"""The noise-aware inverter on tiny models."""

from dataclasses import replace
from pathlib import Path

from cutlayer.audit.attacks.learned_inverter import LearnedInverter
from cutlayer.audit.attacks.noise_aware_inverter import NoiseAwareInverter
from cutlayer.audit.attacks.published_decoder import PublishedDecoder
from cutlayer.model.partition import Cut
from cutlayer.privacy.mechanism import MECHANISMS, Mechanism
from tests.audit_worlds import World, random_rows, tiny_knowledge, world_of
from tests.unit.audit.attacks.steps import steps


def noised_world(folder: Path, rule: Mechanism) -> World:
    knowledge = tiny_knowledge(folder, rule=rule, cut=Cut(0, 3))
    knowledge = replace(knowledge, public_rows=random_rows(120, 12, seed=3))
    return world_of(knowledge, random_rows(12, 10), with_gradients=False)


def recovery(
    world: World, attack: NoiseAwareInverter | LearnedInverter | PublishedDecoder
) -> float:
    guesses = attack.reconstruct(world.evidence, world.knowledge, steps(40))
    return world.recovery([guess.tokens for guess in guesses])


def test_training_under_the_noise_pays_and_beats_the_published_decoder(tmp_path: Path) -> None:
    world = noised_world(tmp_path, MECHANISMS.make("gaussian", 0.06))
    aware = recovery(world, NoiseAwareInverter())
    assert aware > 0.6
    assert aware >= recovery(world, LearnedInverter()) - 0.02
    assert recovery(world, PublishedDecoder()) < 0.1


def test_it_reads_through_a_clip(tmp_path: Path) -> None:
    world = noised_world(tmp_path, MECHANISMS.make("clipped_gaussian", 0.1, 0.5))
    assert recovery(world, NoiseAwareInverter()) > 0.6
