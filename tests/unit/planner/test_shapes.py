"""Sizes that come from a config alone are those of the parts that are loaded."""

from pathlib import Path

import pytest

from cutlayer.model.adapters import AdapterSettings, attach
from cutlayer.model.checkpoint import load_client_parts, load_part
from cutlayer.model.folder import resolve_model
from cutlayer.model.partition import Cut, Part, PartModule
from cutlayer.planner.shapes import read_shapes
from tests.tiny_models import tiny_model


def _weights(*parts: PartModule) -> int:
    storages = {
        p.untyped_storage().data_ptr(): p.untyped_storage().nbytes()
        for part in parts
        for p in part.parameters()
    }
    return sum(storages.values())


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2", "mixtral"])
def test_weights_of_every_part_are_what_loading_makes(family: str, tmp_path: Path) -> None:
    folder, _ = tiny_model(family, tmp_path)
    shapes = read_shapes(resolve_model(folder).config, "float32", AdapterSettings())
    cut = Cut(1, 3)
    head, tail = load_client_parts(folder, cut)
    trunk = load_part(folder, cut, Part.TRUNK)
    ends = shapes.embedding_bytes + shapes.norm_bytes + shapes.lm_head_bytes
    client = ends + shapes.blocks_bytes(range(1)) + shapes.blocks_bytes(range(3, 4))
    assert _weights(head, tail) == client
    assert _weights(trunk) == shapes.blocks_bytes(range(1, 3))


@pytest.mark.parametrize("kinds", [["lora"], ["prefix"], ["lora", "prefix"]])
def test_an_adapter_has_the_values_that_attaching_makes(kinds: list[str], tmp_path: Path) -> None:
    folder, _ = tiny_model("llama", tmp_path)
    settings = AdapterSettings.model_validate({"kinds": kinds, "rank": 4})
    shapes = read_shapes(resolve_model(folder).config, "float32", settings)
    trunk = load_part(folder, Cut(1, 3), Part.TRUNK)
    adapter = attach(trunk, settings)
    values = sum(p.numel() for p in adapter.parameters())
    assert 4 * values == shapes.adapter_bytes(range(1, 3))


def test_half_precision_halves_weights_and_leaves_the_adapter(tmp_path: Path) -> None:
    config = resolve_model(tiny_model("llama", tmp_path)[0]).config
    full = read_shapes(config, "float32", AdapterSettings())
    half = read_shapes(config, "bfloat16", AdapterSettings())
    assert 2 * half.block_bytes[0] == full.block_bytes[0]
    assert half.adapter_values == full.adapter_values
