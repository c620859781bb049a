"""Label inference on tiny models: exact without noise, through a clip, and under noise."""

import itertools
from dataclasses import replace
from pathlib import Path

import pytest

from cutlayer.audit.attack import Effort
from cutlayer.audit.attacks.label_inference import LabelInference
from cutlayer.errors import ConfigError
from cutlayer.model.partition import Cut
from cutlayer.privacy.mechanism import MECHANISMS, Mechanism
from tests.audit_worlds import World, random_rows, same_norm_noise, tiny_world, world_of
from tests.unit.audit.attacks.steps import steps


def labels_right(world: World) -> tuple[int, int, int]:
    """Scored labels that are right, all scored labels, and places wrongly said to be scored."""
    guesses = LabelInference().reconstruct(world.evidence, world.knowledge, steps(1000))
    right = scored = wrong = 0
    for guess, labels in zip(guesses, world.labels, strict=True):
        for guessed, label in zip(guess.tokens, labels, strict=True):
            right += label >= 0 and guessed == label
            scored += label >= 0
            wrong += label < 0 and guessed >= 0
    return right, scored, wrong


@pytest.mark.parametrize(
    ("family", "upper"), [("llama", 4), ("llama", 2), ("gemma2", 3), ("gpt2", 3)]
)
def test_every_label_and_no_other_place_is_found(tmp_path: Path, family: str, upper: int) -> None:
    world = tiny_world(tmp_path, random_rows(3, 8), cut=Cut(1, upper), family=family)
    assert labels_right(world) == (6, 6, 0)


def test_a_row_whose_every_token_is_scored_is_read_whole(tmp_path: Path) -> None:
    rows = random_rows(3, 8)
    knowledge = tiny_world(tmp_path, rows).knowledge
    world = world_of(knowledge, rows, labels=[[-100, *row[1:]] for row in rows])
    right, scored, _ = labels_right(world)
    assert right == scored == sum(len(row) - 1 for row in rows)


@pytest.mark.parametrize(
    "rule", [MECHANISMS.make("gaussian", 0.001), MECHANISMS.make("clipped_gaussian", 0.002, 0.1)]
)
def test_labels_are_read_through_a_clip_and_little_noise(tmp_path: Path, rule: Mechanism) -> None:
    right, scored, _ = labels_right(tiny_world(tmp_path, random_rows(4, 8), gradient_rule=rule))
    assert right >= 0.75 * scored


def test_noise_of_the_same_norm_gives_nothing_away(tmp_path: Path) -> None:
    world = tiny_world(tmp_path, random_rows(4, 8))
    right, _, _ = labels_right(replace(world, evidence=same_norm_noise(world.evidence)))
    assert right <= 1


def test_rows_past_the_time_are_said_to_be_unfinished(tmp_path: Path) -> None:
    world = tiny_world(tmp_path, random_rows(3, 8))
    guesses = LabelInference().reconstruct(world.evidence, world.knowledge, steps(12))
    assert guesses[0].num_unfinished == 0
    assert guesses[-1].num_unfinished == len(world.tokens[-1])
    assert set(guesses[-1].tokens) == {-1}


def test_a_row_that_time_ends_within_keeps_what_was_found_and_says_so(tmp_path: Path) -> None:
    world = tiny_world(tmp_path, random_rows(1, 120))
    looks = itertools.count()
    effort = Effort(seconds=1.0, clock_s=lambda: float(next(looks)) / 10)
    (guess,) = LabelInference().reconstruct(world.evidence, world.knowledge, effort)
    assert next(looks) < 20, "a long row is given up within, not behind it"
    assert guess.num_unfinished == len(world.tokens[0])
    found = [place for place, token in enumerate(guess.tokens) if token >= 0]
    assert set(found) <= set(range(64, 120)), "places are read from the last, which are scored"


def test_without_gradients_it_says_what_is_missing(tmp_path: Path) -> None:
    knowledge = tiny_world(tmp_path).knowledge
    world = world_of(knowledge, random_rows(1, 8), with_gradients=False)
    with pytest.raises(ConfigError, match="no gradient"):
        LabelInference().reconstruct(world.evidence, knowledge, steps(1))
