"""Gradient matching on tiny models: scored tokens from the gradient alone."""

from pathlib import Path

import pytest
import torch

from cutlayer.audit.attacks.tag import Tag
from cutlayer.audit.tail_gradients import Readout, TailRow
from cutlayer.errors import ConfigError
from cutlayer.model.loss import completion_loss_sum
from cutlayer.model.rows import pack
from cutlayer.privacy.mechanism import MECHANISMS
from tests.audit_worlds import random_rows, tiny_world, world_of
from tests.unit.audit.attacks.steps import steps


def test_it_finds_the_scored_tokens_and_says_nothing_of_the_others(tmp_path: Path) -> None:
    world = tiny_world(tmp_path, random_rows(3, 8))
    guesses = Tag().reconstruct(world.evidence, world.knowledge, steps(1000))
    for guess, labels in zip(guesses, world.labels, strict=True):
        assert guess.tokens == tuple(max(-1, label) for label in labels)


def test_it_applies_the_clip_to_its_candidates(tmp_path: Path) -> None:
    rule = MECHANISMS.make("clipped_gaussian", 0.002, 0.1)
    rows = random_rows(3, 8)
    knowledge = tiny_world(tmp_path, rows, gradient_rule=rule).knowledge
    world = world_of(knowledge, rows, labels=[[-100] * (len(row) - 1) + row[-1:] for row in rows])
    guesses = Tag().reconstruct(world.evidence, world.knowledge, steps(1000))
    right = sum(guess.tokens[-1] == row[-1] for guess, row in zip(guesses, rows, strict=True))
    assert right >= 2


def test_without_gradients_it_says_what_is_missing(tmp_path: Path) -> None:
    knowledge = tiny_world(tmp_path).knowledge
    world = world_of(knowledge, random_rows(1, 8), with_gradients=False)
    with pytest.raises(ConfigError, match="no gradient"):
        Tag().reconstruct(world.evidence, knowledge, steps(1))


def test_a_row_in_the_tail_gives_the_gradient_of_the_loss(tmp_path: Path) -> None:
    world = tiny_world(tmp_path, random_rows(1, 8))
    (seen,), (labels,), (tokens,) = world.evidence.observations, world.labels, world.tokens
    assert seen.y_LD is not None
    tail = world.knowledge.parts[1]
    y_LD = seen.y_LD.clone().requires_grad_()
    loss_sum, _ = completion_loss_sum(tail, y_LD, pack([tokens]), torch.tensor(labels))
    (expected_LD,) = torch.autograd.grad(loss_sum, y_LD)
    row = TailRow(tail, seen.y_LD)
    places = (torch.tensor(labels) >= 0).nonzero().squeeze(1) - 1
    found_LD = row.of_labels(places, torch.tensor(labels)[places + 1])
    torch.testing.assert_close(found_LD, expected_LD, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(
        row.from_states(row.to_states(found_LD, 150)).detach(), found_LD, rtol=1e-3, atol=1e-5
    )


@pytest.mark.parametrize("family", ["llama", "granite", "gemma2"])
def test_the_readout_agrees_with_the_logits(tmp_path: Path, family: str) -> None:
    world = tiny_world(tmp_path, random_rows(1, 8), family=family)
    (seen,) = world.evidence.observations
    assert seen.y_LD is not None
    tail = world.knowledge.parts[1]
    readout, row = Readout(tail), TailRow(tail, seen.y_LD)
    candidates = torch.arange(5)
    plain = readout.rows_DV[:, candidates].T @ row.norm_jacobian(3)
    assert readout.is_linear == (family != "gemma2")
    tolerance = 1e-3 if readout.is_linear else 0.2
    exact = row.label_states(3, candidates, readout)
    assert float((plain - exact).norm() / exact.norm()) < tolerance
