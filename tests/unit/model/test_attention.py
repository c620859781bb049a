"""Packed attention: rows do not see each other, windows hold, and strangers are refused."""

import itertools
from pathlib import Path

import pytest
import torch
from torch import nn

from cutlayer.errors import ModelError
from cutlayer.model import attention
from cutlayer.model.attention import PackedRows, packed_attention, row_kernel
from cutlayer.model.checkpoint import load_part, load_parts
from cutlayer.model.partition import Cut, Part
from cutlayer.model.rows import Rows, pack
from tests.tiny_models import SLIDING_WINDOW, tiny_model


class Attention(nn.Module):
    """What transformers hands to an attention function."""

    layer_idx = 0
    is_causal = True
    num_key_value_groups = 2


def qkv(num_tokens: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    return (
        torch.randn(1, 4, num_tokens, 8),
        torch.randn(1, 2, num_tokens, 8),
        torch.randn(1, 2, num_tokens, 8),
    )


def packed(lengths: tuple[int, ...], window: int | None = None) -> PackedRows:
    return PackedRows(Rows(lengths=lengths), row_kernel("sdpa"), 1, [window])


def expected(num_tokens: int, window: int) -> torch.Tensor:
    """Plain softmax attention of one row with an explicit band."""
    query, key, value = qkv(num_tokens)
    key, value = key.repeat_interleave(2, dim=1), value.repeat_interleave(2, dim=1)
    distance = torch.arange(num_tokens)[:, None] - torch.arange(num_tokens)[None]
    scores = (query @ key.transpose(2, 3)) * 8**-0.5
    scores = scores.masked_fill(~((distance >= 0) & (distance < window)), float("-inf"))
    return (scores.softmax(dim=-1) @ value).transpose(1, 2)


@pytest.mark.parametrize("window", [1, 2, 5, 7, 8, 100])
def test_a_window_of_w_sees_itself_and_w_minus_1_before(window: int) -> None:
    query, key, value = qkv(7)
    rows = packed((7,), window)
    output, _ = packed_attention(
        Attention(), query, key, value, None, packed_rows=rows, sliding_window=window
    )
    assert torch.allclose(output, expected(7, window), atol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2"])
def test_a_row_does_not_depend_on_its_neighbours(family: str, tmp_path: Path) -> None:
    folder, _ = tiny_model(family, tmp_path)
    trunk = load_part(folder, Cut(0, 4), Part.TRUNK)
    h_ND = torch.randn(12, trunk.hidden_size)
    rows = Rows(lengths=(4, 5, 3))
    before = trunk(h_ND, rows)
    changed = h_ND.clone()
    changed[4:9] = torch.randn(5, trunk.hidden_size)
    after = trunk(changed, rows)
    assert torch.equal(before[:4], after[:4])
    assert torch.equal(before[9:], after[9:])
    assert not torch.allclose(before[4:9], after[4:9])


@torch.no_grad()
def test_a_token_does_not_depend_on_later_ones_nor_on_those_before_its_window(
    tmp_path: Path,
) -> None:
    folder, _ = tiny_model("mistral", tmp_path)
    one_block = load_part(folder, Cut(0, 1), Part.TRUNK)
    h_ND = torch.randn(12, one_block.hidden_size)
    rows = Rows(lengths=(12,))
    before, place = one_block(h_ND, rows), 8
    for changed_place, depends in (
        (place + 1, False),
        (place - SLIDING_WINDOW, False),
        (place - SLIDING_WINDOW + 1, True),
    ):
        changed = h_ND.clone()
        changed[changed_place] += 1.0
        is_same = torch.allclose(one_block(changed, rows)[place], before[place], atol=1e-6)
        assert is_same is not depends


@torch.no_grad()
def test_long_rows_do_not_change_the_rotation_of_short_neighbours(tmp_path: Path) -> None:
    factors = {"short_factor": [1.0, 1.5, 2.0, 2.5], "long_factor": [3.0, 5.0, 7.0, 9.0]}
    rope = {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "original_max_position_embeddings": 8,
        **factors,
    }
    folder, unsplit = tiny_model(
        "phi3", tmp_path, rope_parameters=rope, original_max_position_embeddings=8
    )
    parts = load_parts(folder, Cut(1, 3))
    texts = [list(range(5)), list(range(20, 40))]
    rows = pack(texts)
    logits = parts[2](parts[1](parts[0](rows), rows), rows)
    theirs = torch.cat([unsplit(torch.tensor([text])).logits[0] for text in texts])
    assert torch.allclose(logits, theirs, atol=1e-5)


def test_a_model_with_masks_of_its_own_is_refused() -> None:
    query, key, value = qkv(3)
    mask = torch.ones(1, 1, 3, 3, dtype=torch.bool)
    with pytest.raises(ModelError, match="Attention builds masks of its own"):
        packed_attention(Attention(), query, key, value, mask, packed_rows=packed((3,)))


def test_a_model_that_hides_the_rows_from_its_attention_is_refused() -> None:
    with pytest.raises(ModelError, match="Attention does not get keyword arguments"):
        packed_attention(Attention(), *qkv(3), None)


def test_a_window_that_the_config_does_not_know_is_refused() -> None:
    with pytest.raises(ModelError, match="window 4, its config says None"):
        packed_attention(Attention(), *qkv(3), None, packed_rows=packed((3,)), sliding_window=4)


def test_a_second_way_to_mix_tokens_is_refused() -> None:
    rows = packed((3,))
    with pytest.raises(ModelError, match="0 attention calls in 1 blocks"):
        rows.finish()


def test_an_attention_without_row_kernel_is_refused_with_the_known_names() -> None:
    with pytest.raises(ModelError, match="'flex_attention' cannot be packed; known: sdpa, eager"):
        row_kernel("flex_attention")


def test_an_architecture_without_its_own_eager_function_is_refused() -> None:
    with pytest.raises(ModelError, match="has no eager_attention_forward"):
        row_kernel("eager").function(Attention())


def varlen_by_hand(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    ends: torch.Tensor,
    *_: object,
    scale: float,
    window_size: tuple[int, int],
    enable_gqa: bool,
) -> torch.Tensor:
    """What the documentation of torch's `varlen_attn` says, on a CPU, which has no such kernel."""
    group = query.shape[1] // key.shape[1] if enable_gqa else 1
    outputs = []
    for begin, end in itertools.pairwise(ends.tolist()):
        q, k, v = (x[begin:end].transpose(0, 1) for x in (query, key, value))
        k, v = k.repeat_interleave(group, 0), v.repeat_interleave(group, 0)
        distance = torch.arange(end - begin)[:, None] - torch.arange(end - begin)[None]
        left = window_size[0] if window_size[0] >= 0 else end - begin
        scores = (q @ k.transpose(1, 2)) * scale
        scores = scores.masked_fill((distance < -window_size[1]) | (distance > left), -torch.inf)
        outputs.append((scores.softmax(-1) @ v).transpose(0, 1))
    return torch.cat(outputs)


@pytest.mark.parametrize("window", [None, 3])
def test_the_varlen_kernel_is_asked_for_the_same_attention(
    window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = packed((4, 1, 6), window)
    settings = {"packed_rows": rows, "sliding_window": window, "scaling": 8**-0.5}
    by_row, _ = packed_attention(Attention(), *qkv(11), None, **settings)
    monkeypatch.setattr(attention, "_VARLEN", varlen_by_hand)
    monkeypatch.setattr(attention, "_fits_varlen", lambda *_: True)
    at_once, _ = packed_attention(Attention(), *qkv(11), None, **settings)
    assert at_once.shape == by_row.shape
    assert torch.allclose(at_once, by_row, atol=1e-6)
