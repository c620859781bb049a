"""An update of few tokens shows them all; where the span is gone, it says nothing."""

from pathlib import Path

import pytest
import torch

from cutlayer.audit.attack import Effort
from cutlayer.audit.attacks.adapter_inversion import AdapterInversion
from cutlayer.audit.evidence import Evidence, Update
from cutlayer.audit.knowledge import Knowledge
from cutlayer.errors import ConfigError
from cutlayer.model.adapters import AdapterSettings, attach
from cutlayer.model.checkpoint import load_parts
from cutlayer.model.loss import completion_loss_sum
from cutlayer.model.optimizer import AdamWSettings, PartOptimizer
from cutlayer.model.partition import Cut
from cutlayer.model.rows import pack
from tests.audit_worlds import tiny_knowledge, update_of

ROW = [84, 104, 101, 32, 112, 97, 105]
LEARNT = set(ROW[:-1])
"""The last token predicts nothing."""


def bag(knowledge: Knowledge, *updates: Update) -> list[set[int]]:
    evidence = Evidence(observations=(), updates=updates)
    guesses = AdapterInversion().reconstruct(evidence, knowledge, Effort())
    return [set(guess.tokens) for guess in guesses]


def trained(knowledge: Knowledge, rank: int, row: list[int], num_adamw_steps: int) -> Update:
    """The update of a head that had learnt before: one plain gradient, or steps of AdamW."""
    head, trunk, tail = load_parts(knowledge.folder, knowledge.cut)
    adapter = attach(head, AdapterSettings(rank=rank))
    torch.manual_seed(1)
    fresh = {k: x + 0.02 * torch.randn_like(x) for k, x in adapter.state().items()}
    adapter.load(fresh)
    packed, optimizer = pack([row]), PartOptimizer(adapter, AdamWSettings())
    for _ in range(max(1, num_adamw_steps)):
        y_ND = trunk(head(packed), packed.without_tokens())
        completion_loss_sum(tail, y_ND, packed, torch.tensor([-100, *row[1:]]))[0].backward()
        if num_adamw_steps:
            optimizer.step(1 / len(row), 1e-3)
    if not num_adamw_steps:
        return Update(round=1, tensors={k: -0.01 * x for k, x in adapter.gradients().items()})
    state = adapter.state()
    return Update(round=1, tensors={key: state[key] - fresh[key] for key in state})


@pytest.mark.parametrize("rank", [16, 32])
def test_a_gradient_of_an_adapter_that_has_learnt_shows_every_token(
    tmp_path: Path, rank: int
) -> None:
    knowledge = tiny_knowledge(tmp_path)
    assert bag(knowledge, trained(knowledge, rank, ROW, 0)) == [LEARNT]


def test_the_first_gradient_shows_every_token_by_the_other_factor(tmp_path: Path) -> None:
    knowledge = tiny_knowledge(tmp_path)
    update = update_of(knowledge, [ROW], [[-100, *ROW[1:]]], rank=16)
    assert bag(knowledge, update) == [LEARNT]


def test_steps_of_adamw_hide_the_span(tmp_path: Path) -> None:
    knowledge = tiny_knowledge(tmp_path)
    (found,) = bag(knowledge, trained(knowledge, 16, ROW, 3))
    assert len(found & LEARNT) <= 1


def test_more_tokens_than_rows_leave_nothing_to_say(tmp_path: Path) -> None:
    knowledge = tiny_knowledge(tmp_path)
    row = list(range(40, 100))
    assert bag(knowledge, trained(knowledge, 4, row, 0)) == [set()]


def test_noise_in_place_of_an_update_shows_nothing(tmp_path: Path) -> None:
    knowledge = tiny_knowledge(tmp_path)
    update = trained(knowledge, 8, ROW, 0)
    noise = {key: torch.randn_like(x) for key, x in update.tensors.items()}
    zeros = {key: torch.zeros_like(x) for key, x in update.tensors.items()}
    made = [Update(round=n, tensors=x) for n, x in enumerate((noise, zeros), start=1)]
    assert bag(knowledge, *made) == [set(), set()]


@pytest.mark.parametrize("family", ["qwen2", "gemma2", "phi3", "gpt_neox"])
def test_families_name_their_first_layer_as_they_like(tmp_path: Path, family: str) -> None:
    knowledge = tiny_knowledge(tmp_path, family=family)
    assert bag(knowledge, trained(knowledge, 16, ROW, 0)) == [LEARNT]


def test_evidence_without_updates_or_head_is_refused(tmp_path: Path) -> None:
    knowledge = tiny_knowledge(tmp_path)
    with pytest.raises(ConfigError, match="aggregates securely"):
        bag(knowledge)
    update = trained(knowledge, 16, ROW, 0)
    headless = tiny_knowledge(tmp_path / "other", cut=Cut(0, 3))
    with pytest.raises(ConfigError, match="the cut is 0"):
        bag(headless, update)
