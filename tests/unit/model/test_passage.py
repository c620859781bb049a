"""Rows that enter and leave a trunk at different blocks, each as if it were alone on its way."""

import itertools
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from cutlayer.errors import ConfigError
from cutlayer.model.adapter_slots import Segment
from cutlayer.model.adapters import Adapter, AdapterSettings, attach, layout_of, use_segments
from cutlayer.model.checkpoint import load_part
from cutlayer.model.folder import resolve_model
from cutlayer.model.kv_cache import RowCache, bytes_per_token
from cutlayer.model.partition import Cut, Part, Trunk
from cutlayer.model.passage import Traveller, pass_through
from cutlayer.model.rows import Rows
from tests.tiny_models import FAMILIES, tiny_model
from tests.unit.model.test_adapters import stir

WHOLE = Cut(0, 4)
BLOCKS = (range(0, 4), range(1, 3), range(2, 4), range(0, 1), range(1, 3))
LENGTHS = ((5, 3), (4,), (2, 6), (7,), (4,))


def _trunk(tmp_path: Path, family: str = "llama", cut: Cut = WHOLE) -> Trunk:
    folder = resolve_model(str(tiny_model(family, tmp_path)[0]), None)
    trunk = load_part(folder, cut, Part.TRUNK, "float32", "cpu")
    assert isinstance(trunk, Trunk)
    return trunk


def _adapters(trunk: Trunk, settings: AdapterSettings) -> list[Adapter]:
    adapters = []
    for number, blocks in enumerate(BLOCKS):
        adapters.append(attach(trunk, settings, f"a{number}", blocks))
        stir(adapters[-1], number)
    return adapters


def _travellers(dropout_seed: int | None = None) -> list[Traveller]:
    return [
        Traveller(
            h_ND=_random(sum(lengths), number).requires_grad_(),
            rows=Rows(lengths=lengths),
            blocks=blocks,
            segment=Segment(
                adapter=f"a{number}",
                num_tokens=sum(lengths),
                dropout_seed=None if dropout_seed is None else dropout_seed + number,
            ),
        )
        for number, (blocks, lengths) in enumerate(zip(BLOCKS, LENGTHS, strict=True))
    ]


def _random(num_tokens: int, seed: int) -> Tensor:
    return torch.randn(num_tokens, 32, generator=torch.Generator().manual_seed(seed))


def _alone(trunk: Trunk, traveller: Traveller) -> Tensor:
    with use_segments(trunk, [traveller.segment]):
        y_ND: Tensor = trunk(traveller.h_ND, traveller.rows, None, traveller.blocks)
    return y_ND


def _assert_close(found: Tensor, expected: Tensor) -> None:
    difference = (found - expected).abs().max() / expected.abs().max()
    # Sums over other numbers of rows round otherwise; these models have large weights.
    assert float(difference.detach()) <= 5e-5


def _gradients(y_ND: Tensor, inputs: Sequence[Tensor]) -> list[Tensor]:
    loss = (y_ND * _random(len(y_ND), 9)).sum()
    return list(torch.autograd.grad(loss, inputs, retain_graph=True))


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_rows_of_several_cuts_pass_as_if_each_were_alone(family: str, tmp_path: Path) -> None:
    trunk = _trunk(tmp_path, family)
    adapters = _adapters(trunk, AdapterSettings(rank=2))
    travellers = _travellers()
    y_ND = pass_through(trunk, travellers)
    pieces = y_ND.split([traveller.rows.num_tokens for traveller in travellers])
    for adapter, traveller, piece_ND in zip(adapters, travellers, pieces, strict=True):
        expected_ND = _alone(trunk, traveller)
        _assert_close(piece_ND, expected_ND)
        inputs = [traveller.h_ND, *adapter.parameters()]
        for ours, theirs in zip(
            _gradients(piece_ND, inputs), _gradients(expected_ND, inputs), strict=True
        ):
            _assert_close(ours, theirs)


@pytest.mark.parametrize("kinds", [["lora"], ["prefix"], ["sparse"], ["lora", "prefix", "sparse"]])
def test_every_kind_of_adapter_acts_on_its_own_blocks_alone(
    kinds: list[str], tmp_path: Path
) -> None:
    trunk = _trunk(tmp_path)
    settings = AdapterSettings.model_validate({"rank": 2, "kinds": kinds})
    adapters = _adapters(trunk, settings)
    whole = layout_of(trunk, settings)
    for adapter, blocks in zip(adapters, BLOCKS, strict=True):
        of_blocks = {k for k in whole if any(f"layers.{index}." in k for index in blocks)}
        assert set(adapter.state()) == of_blocks == set(layout_of(trunk, settings, blocks))
    travellers = _travellers()
    pieces = pass_through(trunk, travellers).split([t.rows.num_tokens for t in travellers])
    for traveller, piece_ND in zip(travellers, pieces, strict=True):
        _assert_close(piece_ND, _alone(trunk, traveller))


def test_a_narrow_trunk_and_some_blocks_of_a_wide_one_give_the_same_bits(tmp_path: Path) -> None:
    wide, narrow = _trunk(tmp_path), _trunk(tmp_path, cut=Cut(1, 3))
    settings = AdapterSettings(rank=2)
    state = attach(narrow, settings).state()
    stirred = {key: value + 0.1 for key, value in state.items()}
    for trunk, blocks in ((wide, range(1, 3)), (narrow, None)):
        adapter = attach(trunk, settings, "same", blocks)
        adapter.load(stirred)
    rows, h_ND = Rows(lengths=(5, 2)), _random(7, 0)
    assert torch.equal(wide(h_ND, rows, None, range(1, 3)), narrow(h_ND, rows))


def test_dropout_draws_the_same_places_whoever_else_is_there(tmp_path: Path) -> None:
    trunk = _trunk(tmp_path)
    _adapters(trunk, AdapterSettings(rank=2, dropout=0.4))
    travellers = _travellers(dropout_seed=3)
    together = pass_through(trunk, travellers).split([t.rows.num_tokens for t in travellers])
    for traveller, piece_ND in zip(travellers, together, strict=True):
        _assert_close(piece_ND, _alone(trunk, traveller))
        undropped = replace(traveller.segment, dropout_seed=None)
        without_ND = _alone(trunk, replace(traveller, segment=undropped))
        assert not torch.allclose(piece_ND, without_ND, atol=1e-3)


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt2"])
def test_cached_rows_of_several_cuts_decode_as_if_each_were_alone(
    family: str, tmp_path: Path
) -> None:
    trunk = _trunk(tmp_path, family)
    _adapters(trunk, AdapterSettings(rank=2))
    joint = [[RowCache(4, 16) for _ in lengths] for lengths in LENGTHS]
    solo = [[RowCache(4, 16) for _ in lengths] for lengths in LENGTHS]
    starts = [tuple(0 for _ in lengths) for lengths in LENGTHS]
    for length in (4, 1, 3):
        travellers = [
            Traveller(
                h_ND=_random(length * len(begun), number + length),
                rows=Rows(lengths=(length,) * len(begun), starts=begun),
                blocks=BLOCKS[number],
                segment=Segment(adapter=f"a{number}", num_tokens=length * len(begun)),
                caches=joint[number],
            )
            for number, begun in enumerate(starts)
        ]
        with torch.inference_mode():
            pieces = pass_through(trunk, travellers).split([len(t.h_ND) for t in travellers])
            for traveller, caches, piece_ND in zip(travellers, solo, pieces, strict=True):
                alone = replace(traveller, caches=caches)
                expected_ND = pass_through(trunk, [alone])
                _assert_close(piece_ND, expected_ND)
        starts = [tuple(start + length for start in begun) for begun in starts]
    for caches, begun in zip(joint, starts, strict=True):
        assert tuple(cache.length for cache in caches) == begun


def test_rows_keep_keys_and_values_of_their_own_blocks_alone(tmp_path: Path) -> None:
    trunk = _trunk(tmp_path)
    per_block = bytes_per_token(trunk, torch.float32) // 4
    for blocks in (range(0, 4), range(1, 3), range(3, 4)):
        assert bytes_per_token(trunk, torch.float32, blocks) == per_block * len(blocks)


def test_blocks_that_the_trunk_does_not_have_are_refused(tmp_path: Path) -> None:
    trunk = _trunk(tmp_path, cut=Cut(1, 3))
    for blocks, _ in itertools.product([range(0, 2), range(2, 4), range(2, 2)], range(2)):
        with pytest.raises(ConfigError, match="which has 1 to 3"):
            trunk(_random(2, 0), Rows(lengths=(2,)), None, blocks)
