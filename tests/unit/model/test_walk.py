"""What is taken for a straight way through a model, and what is not."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from cutlayer.model.checkpoint import load_parts
from cutlayer.model.kv_cache import RowCache
from cutlayer.model.partition import Cut
from cutlayer.model.rows import Rows, pack
from cutlayer.model.walk import learn_walk, says_only
from tests.tiny_models import FAMILIES, tiny_model

CUT = Cut(1, 3)
STRAIGHT = {"llama", "mistral", "olmo2", "phi3", "qwen2", "qwen3", "smollm3"}
BENT = {"gpt2"}
"""It adds learned positions to what enters."""


class _Out:
    def __init__(self, states: Tensor) -> None:
        self.last_hidden_state = self.logits = states


class _Base(nn.Module):
    """Two blocks, and what a family might do between them."""

    def __init__(self, between: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.between = between

    def forward(self, inputs_embeds: Tensor, use_cache: bool) -> _Out:
        return _Out(self.second(self.between(self.first(inputs_embeds))))


def _learn(between: Callable[[Tensor], Tensor]) -> object:
    base = _Base(between)
    inputs = {"inputs_embeds": torch.randn(1, 3, 4), "use_cache": False}
    with torch.inference_mode():
        walk = learn_walk(base, [base.first, base.second], lambda: inputs)
        if walk is not None:
            other = {"inputs_embeds": torch.randn(1, 1, 4), "use_cache": False}
            assert torch.equal(walk(other), base(**other).last_hidden_state)
    return walk


def test_pieces_one_after_another_are_a_straight_way() -> None:
    assert _learn(lambda x: x) is not None


@pytest.mark.parametrize("change", [lambda x: 2 * x, lambda x: x.mul_(2), lambda x: x.clone()])
def test_a_model_that_touches_the_states_is_called_as_it_is(
    change: Callable[[Tensor], Tensor],
) -> None:
    assert _learn(change) is None


@pytest.mark.parametrize(
    ("change", "is_bare"),
    [
        (lambda x: x, True),
        (lambda x: 2 * x, False),
        (lambda x: x.mul_(2), False),
        (lambda x: 3 * torch.tanh(x / 3), False),
    ],
)
def test_scaled_and_capped_logits_are_not_what_the_head_says(
    change: Callable[[Tensor], Tensor], is_bare: bool
) -> None:
    lm_head = nn.Linear(4, 7)

    class Model(nn.Module):
        def forward(self, inputs_embeds: Tensor, use_cache: bool) -> _Out:
            return _Out(change(lm_head(inputs_embeds)))

    with torch.inference_mode():
        assert says_only(Model(), lm_head, torch.randn(1, 2, 4)) is is_bare


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_decoding_by_the_straight_way_has_the_bits_of_the_whole_call(
    family: str, tmp_path: Path
) -> None:
    folder, _ = tiny_model(family, tmp_path)
    prompts, tokens = [[1, 2, 3, 4, 5, 6, 7, 8], [9, 8, 7]], [[5], [6]]
    found = []
    for is_straight in (True, False):
        head, trunk, tail = load_parts(folder, CUT)
        if not is_straight:
            for part in (head, trunk, tail):
                part._walk = lambda *_: None  # type: ignore[method-assign, assignment]
        caches = [[RowCache(len(p.block_range), 32) for _ in prompts] for p in (head, trunk, tail)]
        logits = []
        with torch.inference_mode():
            for rows in (pack(prompts), pack(tokens, [8, 3]), pack(tokens, [9, 4])):
                layout: Rows = rows.without_tokens()
                y_ND = trunk(head(rows, caches[0]), layout, caches[1])
                logits.append(tail(y_ND, layout, caches[2]))
        found.append(logits)
        if is_straight:
            ways = [way is not None for part in (head, trunk, tail) for way in part._walks.values()]
            assert ways
            if family in STRAIGHT:
                assert all(ways)
            if family in BENT:
                assert not all(ways)
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)
