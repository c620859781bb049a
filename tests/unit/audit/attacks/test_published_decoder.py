"""The published decoder keeps the published defect."""

from dataclasses import replace
from pathlib import Path

import torch

from cutlayer.audit.attacks.published_decoder import PublishedDecoder
from cutlayer.model.partition import Cut
from tests.audit_worlds import random_rows, tiny_knowledge, world_of
from tests.unit.audit.attacks.steps import steps


def test_its_guess_at_a_place_does_not_depend_on_the_vector_there(tmp_path: Path) -> None:
    knowledge = tiny_knowledge(tmp_path, cut=Cut(1, 3))
    knowledge = replace(knowledge, public_rows=random_rows(60, 12, seed=3))
    world = world_of(knowledge, random_rows(1, 10), with_gradients=False)
    (seen,) = world.evidence.observations
    changed = seen.h_LD.clone()
    changed[-1] = torch.randn(changed.shape[1])
    evidence = replace(world.evidence, observations=(replace(seen, h_LD=changed),))
    (before,), (after,) = (
        PublishedDecoder().reconstruct(given, knowledge, steps(20))
        for given in (world.evidence, evidence)
    )
    assert before.tokens == after.tokens
    assert before.tokens[0] == -1
    assert len(before.tokens) == 10
