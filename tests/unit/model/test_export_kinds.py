"""Exports of prefixes, sparse rows and combinations: files, and what is refused."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from cutlayer.errors import ModelError, StorageError
from cutlayer.model.adapters import AdapterSettings, AdapterState, attach
from cutlayer.model.export import export_adapter, join_states, merge_adapter
from cutlayer.model.partition import Part
from tests.tiny_models import tiny_llama_folder, tiny_model
from tests.unit.model.stand_in import views
from tests.unit.model.test_adapter_kinds import _settings


def _states(folder: Path, settings: AdapterSettings) -> list[AdapterState]:
    model = AutoModelForCausalLM.from_pretrained(folder)
    generator = torch.Generator().manual_seed(3)
    states = [attach(part, settings).state() for part in views(model, 1, 3)]
    return [
        {key: torch.randn(v.shape, generator=generator) * 0.2 for key, v in state.items()}
        for state in states
    ]


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A tiny llama's folder."""
    return tiny_llama_folder(tmp_path)


def _exported(base: Path, tmp_path: Path, kinds: list[str]) -> Path:
    settings = _settings(kinds)
    export_adapter(tmp_path / "adapter", _states(base, settings), settings, str(base))
    return tmp_path / "adapter"


def test_several_kinds_have_a_folder_each_and_replace_an_earlier_export(
    base: Path, tmp_path: Path
) -> None:
    _exported(base, tmp_path, ["sparse"])
    folder = _exported(base, tmp_path, ["lora", "prefix", "sparse"])
    assert sorted(path.name for path in folder.iterdir()) == ["lora", "prefix", "sparse"]
    before = {p: p.read_bytes() for p in folder.rglob("*.*")}
    _exported(base, tmp_path, ["lora", "prefix", "sparse"])
    assert {p: p.read_bytes() for p in folder.rglob("*.*")} == before
    (folder / "lora" / "thesis.txt").write_text("x")
    with pytest.raises(StorageError, match="holds other files"):
        _exported(base, tmp_path, ["sparse"])


def test_a_sparse_folder_is_what_the_docs_say(base: Path, tmp_path: Path) -> None:
    folder = _exported(base, tmp_path, ["sparse"])
    table = json.loads((folder / "sparse_config.json").read_bytes())
    assert table == {
        "base_model_name_or_path": str(base),
        "choose": "largest",
        "dense_ratio": 0.5,
        "fan_in_fan_out": False,
        "format": "cutlayer-sparse-1",
        "qkv_ratio": 0.5,
    }
    tensors = load_file(folder / "sparse_model.safetensors")
    rows = tensors["model.layers.0.mlp.up_proj.rows"]
    assert rows.dtype == torch.int64
    assert rows.tolist() == sorted(set(rows.tolist()))
    weight = AutoModelForCausalLM.from_pretrained(base).model.layers[0].mlp.up_proj.weight
    norms = weight.detach().abs().sum(dim=1)
    assert norms[rows].min() >= norms[[i for i in range(48) if i not in rows.tolist()]].max()
    assert tensors["model.layers.0.mlp.up_proj.delta"].shape == (24, 32)


def test_rows_that_were_chosen_in_two_bytes_are_found_again(tmp_path: Path) -> None:
    base, model = tiny_model("llama", tmp_path)
    settings = _settings(["sparse"])
    states = [attach(part, settings).state() for part in views(model.to(torch.bfloat16), 1, 3)]
    states = [{key: value + 0.1 for key, value in state.items()} for state in states]
    export_adapter(tmp_path / "adapter", states, settings, str(base))
    assert load_file(tmp_path / "adapter" / "sparse_model.safetensors")


def test_rows_of_other_weights_are_refused(base: Path, tmp_path: Path) -> None:
    states = _states(base, _settings(["sparse"]))
    other = tiny_llama_folder(tmp_path / "other", seed=5)
    with pytest.raises(ModelError, match=r"does not give the rows of .* that were trained"):
        export_adapter(tmp_path / "adapter", states, _settings(["sparse"]), str(other))
    assert not (tmp_path / "adapter").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rows": torch.tensor([0, 99])}, "do not fit"),
        ({"rows": torch.tensor([0, -1])}, "do not fit"),
        ({"delta": torch.zeros(2, 31)}, "do not fit"),
        ({"rows": torch.zeros(0, dtype=torch.int64), "delta": torch.zeros(0, 32)}, "do not fit"),
        ({"rows": torch.zeros(2, 1, dtype=torch.int64)}, "do not fit"),
        ({"delta": None}, "rows without differences"),
    ],
)
def test_damaged_rows_are_not_merged(
    base: Path, tmp_path: Path, change: dict[str, torch.Tensor | None], message: str
) -> None:
    folder = _exported(base, tmp_path, ["sparse"])
    path = "model.layers.0.mlp.up_proj"
    whole = {"rows": torch.tensor([0, 1]), "delta": torch.zeros(2, 32), **change}
    tensors = {f"{path}.{name}": value for name, value in whole.items() if value is not None}
    save_file(tensors, folder / "sparse_model.safetensors")
    with pytest.raises(ModelError, match=message):
        merge_adapter(base, folder, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_rows_of_a_weight_that_is_no_matrix_are_not_merged(base: Path, tmp_path: Path) -> None:
    folder = _exported(base, tmp_path, ["sparse"])
    norm = "model.layers.0.input_layernorm"
    tensors = {f"{norm}.rows": torch.tensor([0]), f"{norm}.delta": torch.zeros(1, 32)}
    save_file(tensors, folder / "sparse_model.safetensors")
    with pytest.raises(ModelError, match="do not fit"):
        merge_adapter(base, folder, tmp_path / "merged")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{}", "describes no sparse rows"),
        ('{"format": "x", "fan_in_fan_out": false}', "format 'x'"),
    ],
)
def test_an_unknown_sparse_format_is_refused(
    base: Path, tmp_path: Path, text: str, message: str
) -> None:
    folder = _exported(base, tmp_path, ["sparse"])
    (folder / "sparse_config.json").write_text(text)
    with pytest.raises(ModelError, match=message):
        merge_adapter(base, folder, tmp_path / "merged")


@pytest.mark.parametrize("kinds", [["prefix"], ["lora", "prefix"]], ids="+".join)
def test_a_prefix_cannot_be_merged(base: Path, tmp_path: Path, kinds: list[str]) -> None:
    folder = _exported(base, tmp_path, kinds)
    with pytest.raises(ModelError, match="is a prefix, which is no weight"):
        merge_adapter(base, folder, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize("parts", [[Part.HEAD, Part.TRUNK], [Part.TAIL]], ids=str)
def test_a_prefix_of_some_parts_does_not_fit_peft(
    base: Path, tmp_path: Path, parts: list[Part]
) -> None:
    settings = _settings(["prefix"], parts=parts)
    states = [state for state in _states(base, settings) if state]
    with pytest.raises(ModelError, match="train all parts"):
        export_adapter(tmp_path / "adapter", states, settings, str(base))


def test_states_that_do_not_fit_their_settings_are_refused(base: Path) -> None:
    states = _states(base, _settings(["prefix"]))
    with pytest.raises(ModelError, match=r"the prefix has \[4\] vectors"):
        join_states(states, _settings(["prefix"], prefix={"num_virtual_tokens": 5}))
    with pytest.raises(ModelError, match="no plain sparse weight"):
        join_states(states, _settings(["sparse"]))
    key = next(iter(states[0]))
    half = [{k: v for k, v in state.items() if k != key} for state in states]
    with pytest.raises(ModelError, match="the prefix of block 0 has only its value"):
        join_states(half, _settings(["prefix"]))
    states[0][key][0, 0] = float("nan")
    with pytest.raises(ModelError, match="is not finite"):
        join_states(states, _settings(["prefix"]))
