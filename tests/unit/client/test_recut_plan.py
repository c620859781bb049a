"""What a re-cut moves, block by block, and whether there is room for what comes."""

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from cutlayer.client.recut_plan import RecutPlan
from cutlayer.client.recut_room import inspect
from cutlayer.client.settings import ModelSettings
from cutlayer.errors import ConfigError, ModelError
from cutlayer.model.adapters import AdapterSettings, attach, layout
from cutlayer.model.checkpoint import load_part
from cutlayer.model.folder import resolve_model
from cutlayer.model.moved_blocks import block_of
from cutlayer.model.partition import Cut, Part
from tests.tiny_models import tiny_llama_folder

NUM_BLOCKS = 6
cuts = st.integers(0, NUM_BLOCKS - 1).flatmap(
    lambda lower: st.integers(lower + 1, NUM_BLOCKS).map(lambda upper: Cut(lower, upper))
)


def _key(block: int) -> str:
    return f"base_model.model.model.layers.{block}.mlp.up_proj.lora_A.weight"


def _state(blocks: range) -> dict[str, Tensor]:
    return {_key(block): torch.tensor([float(block)]) for block in blocks}


def _saved(cut: Cut) -> dict[str, dict[str, Tensor]]:
    saved = {}
    for part in (Part.HEAD, Part.TAIL):
        state = _state(cut.blocks(part, NUM_BLOCKS))
        saved[str(part)] = state
        saved[f"{part}_optimizer"] = {f"{key}.step": x for key, x in state.items()}
    return saved


@given(cuts, cuts)
def test_every_block_is_somewhere_once_before_and_after(old: Cut, new: Cut) -> None:
    plan = RecutPlan(old=old, new=new, num_blocks=NUM_BLOCKS)
    up, up_moments = plan.leaving(_saved(old))
    assert [block_of(key) for key in up] == plan.to_server
    assert sorted(up_moments) == [f"{key}.step" for key in sorted(up)]
    came = {key: x for key, x in _state(old.trunk).items() if block_of(key) in plan.to_client}
    moments = {f"{key}.step": x for key, x in came.items()}
    files = plan.files(_saved(old), came, moments)
    wanted = _saved(new)
    assert {name: sorted(state) for name, state in files.items()} == {
        name: sorted(state) for name, state in wanted.items()
    }
    assert all(torch.equal(files[n][k], x) for n, state in wanted.items() for k, x in state.items())
    assert [block for run in plan.runs_to_client for block in run.trunk] == plan.to_client
    assert plan.is_there == (not plan.to_server and not plan.to_client)


@pytest.mark.parametrize(
    ("parts", "new", "is_refused"),
    [
        (["head", "trunk", "tail"], Cut(0, 6), False),
        (["head", "tail"], Cut(3, 4), True),
        (["head", "trunk"], Cut(1, 4), False),
        (["head", "trunk"], Cut(2, 3), True),
        (["tail"], Cut(1, 4), False),
        ([], Cut(0, 6), False),
        # From tail to head, past the trunk.
        (["head"], Cut(5, 6), True),
    ],
)
def test_a_block_must_learn_on_both_sides_of_its_move_or_on_none(
    parts: list[Part], new: Cut, is_refused: bool
) -> None:
    plan = RecutPlan(old=Cut(2, 4), new=new, num_blocks=NUM_BLOCKS)
    trained = [Part(part) for part in parts]
    if not is_refused:
        plan.check_trained(trained)
        return
    with pytest.raises(ConfigError, match="what learns would change"):
        plan.check_trained(trained)


def test_a_cut_beyond_the_model_is_none() -> None:
    with pytest.raises(ConfigError, match="exceeds the model's 6 blocks"):
        RecutPlan(old=Cut(2, 4), new=Cut(2, 7), num_blocks=NUM_BLOCKS)


@pytest.mark.parametrize("kind", ["lora", "sparse"])
def test_blocks_that_come_are_known_before_anything_moves(tmp_path: Path, kind: str) -> None:
    folder = resolve_model(str(tiny_llama_folder(tmp_path)))
    settings = AdapterSettings(kinds=[kind], rank=2)  # type: ignore[list-item]
    model = ModelSettings(path=str(tmp_path), lower=1, upper=3)
    runs = [Cut(0, 1), Cut(2, 4)]
    arrived = inspect(folder, model, settings, runs, lambda device: None)
    parts = [load_part(folder, run, Part.TRUNK) for run in runs]
    assert arrived.layout == {k: s for p in parts for k, s in layout(attach(p, settings)).items()}
    assert sorted(arrived.leaves) == ["block.0", "block.2", "block.3"]
    frozen = sum(p.numel() for part in parts for p in part.parameters() if not p.requires_grad)
    assert arrived.num_bytes > 4 * frozen
    inspect(folder, model, settings, runs, lambda device: arrived.num_bytes)
    with pytest.raises(ConfigError, match=r"blocks 0, 2, 3 .*without memory"):
        inspect(folder, model, settings, runs, lambda device: arrived.num_bytes - 1)


def test_nothing_that_comes_needs_no_memory(tmp_path: Path) -> None:
    folder = resolve_model(str(tiny_llama_folder(tmp_path)))
    model = ModelSettings(path=str(tmp_path), lower=1, upper=3)
    arrived = inspect(folder, model, AdapterSettings(), [], lambda device: 0)
    assert (arrived.leaves, arrived.layout, arrived.num_bytes) == ({}, {}, 0)


def test_a_model_folder_without_the_new_blocks_is_refused(tmp_path: Path) -> None:
    folder = resolve_model(str(tiny_llama_folder(tmp_path)))
    model = ModelSettings(path=str(tmp_path), lower=1, upper=3)
    gone = {n: s for n, s in folder._shard_of.items() if ".layers.2." not in n}
    folder._shard_of = gone
    with pytest.raises(ModelError, match=r"layers\.2\."):
        inspect(folder, model, AdapterSettings(), [Cut(2, 3)], lambda device: None)
