"""The completion loss: a sum over scored tokens, never across rows."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from cutlayer.errors import ConfigError
from cutlayer.model.checkpoint import load_part
from cutlayer.model.loss import NOT_SCORED, completion_loss_sum, scored_places
from cutlayer.model.partition import Cut, Part, Tail
from cutlayer.model.rows import Rows
from tests.tiny_models import VOCAB_SIZE, tiny_llama_folder

ROWS = Rows(lengths=(4, 1, 3))


@pytest.fixture(scope="module")
def tail(tmp_path_factory: pytest.TempPathFactory) -> Tail:
    part = load_part(tiny_llama_folder(tmp_path_factory.mktemp("model")), Cut(1, 3), Part.TAIL)
    assert isinstance(part, Tail)
    return part


def states(tail: Tail, rows: Rows = ROWS) -> Tensor:
    return torch.randn(rows.num_tokens, tail.hidden_size, requires_grad=True)


def test_the_sum_equals_plain_cross_entropy_of_each_row(tail: Tail) -> None:
    y_ND, labels = states(tail), torch.tensor([-100, 5, -100, 7, 9, 3, -100, 8])
    loss_sum, num_tokens = completion_loss_sum(tail, y_ND, ROWS, labels)

    logits_NV = tail(y_ND, ROWS)
    expected = [(0, 5), (2, 7), (6, 8)]
    plain = sum(
        nn.functional.cross_entropy(logits_NV[place], torch.tensor(label))
        for place, label in expected
    )
    assert num_tokens == len(expected)
    assert torch.allclose(loss_sum, torch.as_tensor(plain), atol=1e-6)


def test_the_first_token_of_a_row_is_predicted_by_nobody() -> None:
    places, targets = scored_places(ROWS, torch.arange(8))
    assert places.tolist() == [0, 1, 2, 5, 6]
    assert targets.tolist() == [1, 2, 3, 6, 7]


def test_logits_are_computed_for_scored_places_alone(tail: Tail) -> None:
    shapes = []
    handle = tail.lm_head.register_forward_hook(lambda _m, _i, out: shapes.append(out.shape))
    labels = torch.full((8,), NOT_SCORED)
    labels[2] = 1
    completion_loss_sum(tail, states(tail), ROWS, labels)
    handle.remove()
    assert shapes == [(1, 1, VOCAB_SIZE)]


def test_a_batch_without_scored_tokens_has_zero_loss_and_zero_gradient(tail: Tail) -> None:
    y_ND = states(tail)
    loss_sum, num_tokens = completion_loss_sum(tail, y_ND, ROWS, torch.full((8,), NOT_SCORED))
    loss_sum.backward()
    assert (loss_sum.item(), num_tokens) == (0.0, 0)
    assert torch.equal(y_ND.grad, torch.zeros_like(y_ND))


def test_the_labels_are_left_as_they_were() -> None:
    labels = torch.arange(8)
    scored_places(ROWS, labels)
    assert torch.equal(labels, torch.arange(8))


def test_the_loss_is_float32_in_a_bfloat16_model(tmp_path: Path) -> None:
    part = load_part(tiny_llama_folder(tmp_path), Cut(1, 3), Part.TAIL, "bfloat16")
    assert isinstance(part, Tail)
    y_ND = torch.randn(8, part.hidden_size, dtype=torch.bfloat16)
    loss_sum, _ = completion_loss_sum(part, y_ND, ROWS, torch.arange(8))
    assert loss_sum.dtype is torch.float32


def test_labels_of_another_length_are_refused(tail: Tail) -> None:
    with pytest.raises(ConfigError, match=r"\(7,\) labels for 8 tokens"):
        completion_loss_sum(tail, states(tail), ROWS, torch.arange(7))
