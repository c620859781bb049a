"""A row's cache: growth, truncation, bytes; and a part that uses it."""

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cutlayer.errors import ConfigError
from cutlayer.model.checkpoint import load_part, load_parts
from cutlayer.model.kv_cache import RowCache, bytes_per_token, capacity_for
from cutlayer.model.partition import Cut, Part, Trunk
from cutlayer.model.rows import Rows, pack
from tests.tiny_models import tiny_llama_folder, tiny_model

HEADS, WIDTH = 2, 3


def tokens(first: int, count: int) -> Tensor:
    """Keys [1, H, count, E] whose values tell their position."""
    return (
        torch.arange(first, first + count, dtype=torch.float32)
        .reshape(1, 1, count, 1)
        .repeat(1, HEADS, 1, WIDTH)
    )


def extend(cache: RowCache, values: Tensor) -> list[Tensor]:
    seen = [cache.append(layer, values, -values)[0] for layer in range(cache.num_layers)]
    cache.advance(values.shape[2])
    return seen


@given(st.lists(st.tuples(st.integers(1, 40), st.integers(0, 200)), min_size=1, max_size=8))
@settings(max_examples=60, deadline=None)
def test_any_sequence_of_appends_and_truncations_reads_back(steps: list[tuple[int, int]]) -> None:
    cache, expected, marker = RowCache(2, max_length=400), torch.zeros(1, HEADS, 0, WIDTH), 0
    for count, keep in steps:
        keep = min(keep, cache.length)
        cache.truncate(keep)
        new = tokens(marker, count)
        marker += count
        expected = torch.cat([expected[:, :, :keep], new], dim=2)
        for keys in extend(cache, new):
            assert torch.equal(keys, expected)
        assert cache.length == expected.shape[2]


def test_memory_grows_by_blocks_and_never_beyond_the_limit() -> None:
    cache, sizes = RowCache(1, max_length=300), set()
    for position in range(300):
        extend(cache, tokens(position, 1))
        sizes.add(cache.nbytes)
    per_token = 2 * HEADS * WIDTH * 4
    assert sorted(sizes) == [per_token * capacity for capacity in (64, 128, 192, 256, 300)]


@given(st.integers(1, 300), st.integers(0, 300))
@settings(max_examples=40, deadline=None)
def test_capacity_is_foretold(first: int, second: int) -> None:
    cache = RowCache(1, max_length=600)
    for count in (first, second):
        extend(cache, tokens(0, count))
    per_token = 2 * HEADS * WIDTH * 4
    assert cache.nbytes == per_token * capacity_for(first + second, 600)


def test_views_are_returned_instead_of_copies() -> None:
    cache = RowCache(1, max_length=10)
    first = extend(cache, tokens(0, 2))[0]
    second = extend(cache, tokens(2, 1))[0]
    assert first.data_ptr() == second.data_ptr()


def test_a_row_beyond_the_limit_is_refused_and_nothing_changes() -> None:
    cache = RowCache(1, max_length=4)
    extend(cache, tokens(0, 3))
    with pytest.raises(ConfigError, match="row of 5 tokens exceeds the cache's 4"):
        cache.append(0, tokens(3, 2), tokens(3, 2))
    assert cache.length == 3


@pytest.mark.parametrize("length", [-1, 4])
def test_truncating_to_what_is_not_cached_is_refused(length: int) -> None:
    cache = RowCache(1, max_length=8)
    extend(cache, tokens(0, 3))
    with pytest.raises(ConfigError, match=f"cannot truncate to {length} tokens: 3 are cached"):
        cache.truncate(length)


def test_an_impossible_cache_is_refused() -> None:
    with pytest.raises(ConfigError, match="cannot cache 0 tokens over 2 blocks"):
        RowCache(2, max_length=0)


def test_a_cache_filled_in_inference_mode_can_be_used_outside_of_it() -> None:
    cache = RowCache(1, max_length=200)
    with torch.inference_mode():
        extend(cache, tokens(0, 2))
    # Within the first buffer, then beyond it.
    for begin, end in ((2, 5), (5, 105)):
        extend(cache, tokens(begin, end - begin))
    with torch.inference_mode():
        assert torch.equal(extend(cache, tokens(105, 1))[0], tokens(0, 106))


def test_no_graph_of_earlier_calls_hangs_on_the_cache() -> None:
    cache = RowCache(1, max_length=8)
    keys = extend(cache, tokens(0, 2).requires_grad_())[0]
    assert not keys.requires_grad


@torch.no_grad()
def test_truncated_rows_continue_as_if_the_tokens_had_never_been(tmp_path: Path) -> None:
    folder, _ = tiny_model("mistral", tmp_path)
    trunk = load_part(folder, Cut(1, 3), Part.TRUNK)
    h_ND = torch.randn(20, trunk.hidden_size)
    caches = [RowCache(2, 64)]
    expected = trunk(h_ND, Rows(lengths=(20,)), [RowCache(2, 64)])

    trunk(h_ND[:15], Rows(lengths=(15,)), caches)
    trunk(torch.randn(5, trunk.hidden_size), Rows(lengths=(5,), starts=(15,)), caches)
    caches[0].truncate(12)
    rest = trunk(h_ND[12:], Rows(lengths=(8,), starts=(12,)), caches)

    assert torch.allclose(rest, expected[12:], atol=1e-5)


@torch.no_grad()
def test_a_call_that_fails_leaves_every_cache_as_it_was(tmp_path: Path) -> None:
    trunk = load_part(tiny_llama_folder(tmp_path), Cut(0, 4), Part.TRUNK)
    caches = [RowCache(4, 64), RowCache(4, 4)]
    h_ND = torch.randn(6, trunk.hidden_size)
    with pytest.raises(ConfigError, match="exceeds the cache's 4"):
        trunk(h_ND, Rows(lengths=(1, 5)), caches)
    assert [cache.length for cache in caches] == [0, 0]
    trunk(h_ND[:5], Rows(lengths=(1, 4)), caches)
    assert [cache.length for cache in caches] == [1, 4]


@torch.no_grad()
def test_caches_that_do_not_fit_the_rows_are_refused(tmp_path: Path) -> None:
    trunk = load_part(tiny_llama_folder(tmp_path), Cut(0, 4), Part.TRUNK)
    h_ND = torch.randn(2, trunk.hidden_size)
    with pytest.raises(ConfigError, match=r"rows start at \(3,\) but the caches hold \(0,\)"):
        trunk(h_ND, Rows(lengths=(2,), starts=(3,)), [RowCache(4, 8)])
    with pytest.raises(ConfigError, match="no caches were given"):
        trunk(h_ND, Rows(lengths=(2,), starts=(3,)))
    with pytest.raises(ConfigError, match="1 caches for 2 rows"):
        trunk(h_ND, Rows(lengths=(1, 1)), [RowCache(4, 8)])


@pytest.mark.parametrize(
    ("family", "per_block"), [("llama", 2 * 2 * 8), ("deepseek_v3", 4 * (16 + 6))]
)
def test_bytes_per_token_are_those_that_a_cache_takes(
    family: str, per_block: int, tmp_path: Path
) -> None:
    folder, _ = tiny_model(family, tmp_path)
    trunk = load_part(folder, Cut(1, 4), Part.TRUNK)
    assert isinstance(trunk, Trunk)
    assert bytes_per_token(trunk, torch.float32) == 3 * per_block * 4
    assert bytes_per_token(trunk, torch.bfloat16) == 3 * per_block * 2


@torch.no_grad()
def test_new_tokens_may_come_several_at_a_time(tmp_path: Path) -> None:
    folder, unsplit = tiny_model("gemma3_text", tmp_path)
    parts = load_parts(folder, Cut(1, 3))
    rows = [list(range(20)), list(range(40, 53))]
    caches = [[RowCache(len(part.block_range), 64) for _ in rows] for part in parts]
    logits: list[list[Tensor]] = [[], []]
    for begin, end in ((0, 9), (9, 11), (11, 20)):
        pieces = pack([row[begin:end] for row in rows], starts=[begin, begin])
        states = parts[0](pieces, caches[0])
        states = parts[1](states, pieces, caches[1])
        out = parts[2](states, pieces, caches[2])
        for row, (first, last) in enumerate(zip(pieces.offsets, pieces.offsets[1:], strict=False)):
            logits[row].append(out[first:last])
    for row, pieces_of_row in zip(rows, logits, strict=True):
        expected = unsplit(torch.tensor([row])).logits[0]
        assert torch.allclose(torch.cat(pieces_of_row), expected, atol=1e-5)
