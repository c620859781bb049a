"""BiSR in both directions, and its forward half alone."""

from pathlib import Path

import torch

from cutlayer.audit.attacks.bisr_bf import BisrBf
from cutlayer.audit.forward_matching import refine
from tests.audit_worlds import random_rows, tiny_world
from tests.unit.audit.attacks.steps import steps
from tests.unit.audit.attacks.test_bisr_b import half_scored_world


def test_nearly_every_token_is_read(tmp_path: Path) -> None:
    world = half_scored_world(tmp_path)
    guesses = BisrBf().reconstruct(world.evidence, world.knowledge, steps(420))
    assert world.recovery([guess.tokens for guess in guesses]) > 0.6


def test_a_wrong_token_is_mended_and_right_ones_stay(tmp_path: Path) -> None:
    world = tiny_world(tmp_path, random_rows(4, 8))
    mended = 0
    for seen, tokens in zip(world.evidence.observations, world.tokens, strict=True):
        right_L = torch.tensor(tokens)
        assert torch.equal(refine(world.knowledge, seen, right_L, lambda: False), right_L)
        wrong_L = right_L.clone()
        wrong_L[4] = (wrong_L[4] + 1) % 256
        mended += torch.equal(refine(world.knowledge, seen, wrong_L, lambda: False), right_L)
    assert mended >= 3


def test_a_row_with_unknown_tokens_is_left_as_it_is(tmp_path: Path) -> None:
    world = tiny_world(tmp_path, random_rows(1, 8))
    unknown_L = torch.tensor([-1, *world.tokens[0][1:]])
    (seen,) = world.evidence.observations
    assert torch.equal(refine(world.knowledge, seen, unknown_L, lambda: False), unknown_L)
