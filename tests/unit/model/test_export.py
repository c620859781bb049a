"""Joining and merging adapters: formats, names, and what is refused."""

import json
import resource
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from cutlayer.errors import ModelError, StorageError
from cutlayer.model.adapters import AdapterSettings, AdapterState, attach
from cutlayer.model.export import export_adapter, join_states, merge_adapter, uses_conv1d
from cutlayer.model.folder import ModelFolder
from cutlayer.model.partition import Part
from tests.tiny_models import tiny_llama_folder, tiny_model
from tests.unit.model.stand_in import views

TOKENS = torch.tensor([[5, 6, 7, 8, 9, 200, 3]])
SETTINGS = AdapterSettings(rank=3, alpha=6.0)
PEFT_WARNS = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")


def trained_states(folder: Path, settings: AdapterSettings = SETTINGS) -> list[AdapterState]:
    """States of three parts with random weights, and nothing of the model that they were on."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    generator = torch.Generator().manual_seed(3)
    states = [attach(part, settings).state() for part in views(model, 1, 3)]
    return [
        {key: torch.randn(v.shape, generator=generator) * 0.2 for key, v in state.items()}
        for state in states
    ]


@torch.no_grad()
def peft_logits(base: Path, adapter: Path) -> Tensor:
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter)
    return model.eval()(TOKENS).logits


@torch.no_grad()
def plain_logits(folder: Path) -> Tensor:
    model, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values())
    return model.eval()(TOKENS).logits


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A tiny llama's folder."""
    return tiny_llama_folder(tmp_path)


@pytest.fixture
def adapter(base: Path, tmp_path: Path) -> Path:
    """An exported adapter with random weights."""
    export_adapter(tmp_path / "adapter", trained_states(base), SETTINGS, str(base))
    return tmp_path / "adapter"


def test_the_folder_is_a_standard_peft_adapter(base: Path, adapter: Path) -> None:
    table = json.loads((adapter / "adapter_config.json").read_bytes())
    assert table["peft_type"] == "LORA"
    assert table["task_type"] == "CAUSAL_LM"
    assert table["base_model_name_or_path"] == str(base)
    assert (table["r"], table["lora_alpha"], table["bias"]) == (3, 6, "none")
    assert type(table["lora_alpha"]) is int
    assert table["target_modules"] == [
        "down_proj",
        "gate_proj",
        "k_proj",
        "o_proj",
        "q_proj",
        "up_proj",
        "v_proj",
    ]
    assert sorted(path.name for path in adapter.iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]


def test_exporting_twice_gives_the_same_bytes(base: Path, adapter: Path, tmp_path: Path) -> None:
    export_adapter(tmp_path / "again", trained_states(base)[::-1], SETTINGS, str(base))
    for path in adapter.iterdir():
        assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes()


def test_an_earlier_export_is_replaced(base: Path, adapter: Path) -> None:
    states = [{key: -value for key, value in state.items()} for state in trained_states(base)]
    export_adapter(adapter, states, SETTINGS, str(base))
    written = load_file(adapter / "adapter_model.safetensors")
    assert all(torch.equal(written[key], value) for state in states for key, value in state.items())


def test_a_full_disk_leaves_the_earlier_export(base: Path, adapter: Path) -> None:
    before = {path.name: path.read_bytes() for path in adapter.iterdir()}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, hard))
    try:
        with pytest.raises(StorageError, match="free space"):
            export_adapter(adapter, trained_states(base), SETTINGS, str(base))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert {path.name: path.read_bytes() for path in adapter.iterdir()} == before
    assert [path.name for path in adapter.parent.iterdir() if path.name.startswith(".")] == []


def test_a_folder_with_other_files_is_not_replaced(base: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    with pytest.raises(StorageError, match="holds other files"):
        export_adapter(tmp_path / "mine", trained_states(base), SETTINGS, str(base))
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "x"


@PEFT_WARNS
@pytest.mark.parametrize(
    "settings",
    [
        SETTINGS.model_copy(update={"parts": [Part.HEAD, Part.TAIL]}),
        SETTINGS.model_copy(update={"targets": ["q_proj", "mlp.up_proj"]}),
        SETTINGS.model_copy(update={"targets": ["layers.2.mlp.up_proj", "k_proj"]}),
    ],
)
def test_peft_adapts_exactly_the_trained_layers(
    settings: AdapterSettings, base: Path, tmp_path: Path
) -> None:
    states = trained_states(base, settings)
    export_adapter(tmp_path / "adapter", states, settings, str(base))
    model = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base), tmp_path / "adapter"
    )
    held = {name for name, _ in model.named_parameters() if ".lora_" in name}
    assert {name.replace(".default", "") for name in held} == set().union(*states)
    merge_adapter(base, tmp_path / "adapter", tmp_path / "merged")
    torch.testing.assert_close(
        plain_logits(tmp_path / "merged"),
        peft_logits(base, tmp_path / "adapter"),
        atol=2e-5,
        rtol=1e-5,
    )


@PEFT_WARNS
def test_names_without_the_base_prefix_are_merged_too(tmp_path: Path) -> None:
    folder = tiny_model("gpt2", tmp_path)[0]
    path = folder / "model.safetensors"
    tensors = {k.removeprefix("transformer."): v for k, v in load_file(path).items()}
    assert "h.0.attn.c_attn.weight" in tensors
    save_file(tensors, path, {"format": "pt"})
    export_adapter(tmp_path / "adapter", trained_states(folder), SETTINGS, str(folder))
    merge_adapter(ModelFolder(folder), tmp_path / "adapter", tmp_path / "merged")
    torch.testing.assert_close(
        plain_logits(tmp_path / "merged"),
        peft_logits(folder, tmp_path / "adapter"),
        atol=1e-5,
        rtol=1e-5,
    )


def test_transposed_layers_are_found_by_architecture(tmp_path: Path) -> None:
    assert uses_conv1d(tiny_model("gpt2", tmp_path)[1].config)
    assert not uses_conv1d(tiny_model("phi3", tmp_path)[1].config)


def test_a_merged_folder_keeps_dtype_tokenizer_and_untouched_tensors(tmp_path: Path) -> None:
    folder, model = tiny_model("llama", tmp_path)
    model.to(torch.bfloat16).save_pretrained(folder)
    settings = SETTINGS.model_copy(update={"targets": ["q_proj"]})
    export_adapter(tmp_path / "adapter", trained_states(folder, settings), settings, str(folder))
    merge_adapter(folder, tmp_path / "adapter", tmp_path / "merged")
    before = load_file(folder / "model.safetensors")
    after = load_file(tmp_path / "merged" / "model.safetensors")
    assert {value.dtype for value in after.values()} == {torch.bfloat16}
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {f"model.layers.{i}.self_attn.q_proj.weight" for i in range(4)}
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    assert tokenizer.chat_template
    merge_adapter(folder, tmp_path / "adapter", tmp_path / "merged")


def test_a_model_is_never_merged_over_other_files(
    base: Path, adapter: Path, tmp_path: Path
) -> None:
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.txt").touch()
    with pytest.raises(StorageError, match="holds other files"):
        merge_adapter(base, adapter, tmp_path / "notes")


def test_a_model_is_never_merged_over_itself(base: Path, adapter: Path) -> None:
    before = (base / "model.safetensors").read_bytes()
    with pytest.raises(StorageError, match="is the base model itself"):
        merge_adapter(base, adapter, base)
    assert (base / "model.safetensors").read_bytes() == before


def test_states_that_overlap_are_refused(base: Path) -> None:
    states = trained_states(base)
    with pytest.raises(ModelError, match="two parts hold base_model"):
        join_states([*states, states[0]], SETTINGS)


def test_nothing_to_export_is_refused() -> None:
    with pytest.raises(ModelError, match="nothing to export"):
        join_states([{}, {}], SETTINGS)


def test_a_diverged_adapter_is_refused(base: Path) -> None:
    states = trained_states(base)
    key = next(iter(states[1]))
    states[1][key][0, 0] = torch.nan
    with pytest.raises(ModelError, match="not finite"):
        join_states(states, SETTINGS)


def test_states_of_another_rank_are_refused(base: Path) -> None:
    with pytest.raises(ModelError, match="does not have rank 8"):
        join_states(trained_states(base), AdapterSettings(rank=8))


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight", "only lora_A of"),
        ("base_model.model.model.norm.weight", "no plain LoRA weight"),
    ],
)
def test_a_malformed_state_is_refused(base: Path, key: str, message: str) -> None:
    states = trained_states(base)
    if key in states[0]:
        del states[0][key]
    else:
        states[0][key] = torch.ones(3)
    with pytest.raises(ModelError, match=message):
        join_states(states, SETTINGS)


def test_an_adapter_of_another_model_is_refused(adapter: Path, tmp_path: Path) -> None:
    other = tiny_model("gpt2", tmp_path)[0]
    with pytest.raises(ModelError, match="which the model does not have"):
        merge_adapter(other, adapter, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_an_adapter_of_another_width_is_refused(base: Path, adapter: Path, tmp_path: Path) -> None:
    path = adapter / "adapter_model.safetensors"
    state = load_file(path)
    key = next(key for key in state if "lora_A" in key)
    save_file(state | {key: torch.ones(3, 8)}, path)
    with pytest.raises(ModelError, match="made for another model"):
        merge_adapter(base, adapter, tmp_path / "merged")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"use_dora": True}, r"LORA with \['use_dora'\]"),
        ({"rank_pattern": {"q_proj": 2}}, "rank_pattern"),
        ({"bias": "all"}, "bias"),
        ({"peft_type": "IA3"}, "IA3"),
        ({"r": 0}, "not a LoRA config"),
        ({"r": None}, "not a LoRA config"),
    ],
)
def test_an_adapter_that_is_not_plain_lora_is_not_merged(
    base: Path, adapter: Path, tmp_path: Path, change: dict[str, object], message: str
) -> None:
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_bytes()) | change))
    with pytest.raises(ModelError, match=message):
        merge_adapter(base, adapter, tmp_path / "merged")


def test_a_missing_adapter_is_named(base: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"cannot read .*adapter_config\.json"):
        merge_adapter(base, tmp_path / "nothing", tmp_path / "merged")


def test_a_quantised_base_is_refused(base: Path, adapter: Path, tmp_path: Path) -> None:
    path = base / "model.safetensors"
    state = load_file(path)
    name = "model.layers.0.self_attn.q_proj.weight"
    save_file(state | {name: state[name].to(torch.float8_e4m3fn)}, path)
    with pytest.raises(ModelError, match="is quantised"):
        merge_adapter(base, adapter, tmp_path / "merged")
