"""GGUF files written here the way llama.cpp writes them, read back as the models they came from."""

import json
import threading
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf.quants import dequantize, quantize
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from cutlayer.errors import ModelError, StorageError
from cutlayer.model.folder import ModelFolder, resolve_model
from cutlayer.model.gguf_import import import_gguf

TYPES = gguf.GGMLQuantizationType
SIZES = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "rms_norm_eps": 2.0**-17,
}
MODELS = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
}


def make_model(architecture: str, *, tied: bool = False) -> PreTrainedModel:
    torch.manual_seed(1)
    config_class, model_class = MODELS[architecture]
    rope = {"rope_type": "default", "rope_theta": 50000.0}
    config = config_class(**SIZES, tie_word_embeddings=tied, rope_parameters=rope)
    model = model_class(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2)
    return model


def interleave_halves(rows: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp's order: per head, row j of the first half is followed by row j of the second."""
    out = np.empty_like(rows)
    size = len(rows) // heads
    for head in range(heads):
        block = rows[head * size : (head + 1) * size]
        out[head * size : (head + 1) * size : 2] = block[: size // 2]
        out[head * size + 1 : (head + 1) * size : 2] = block[size // 2 :]
    return out


def write_gguf(
    path: Path,
    architecture: str,
    model: PreTrainedModel,
    matrix_type: TYPES = TYPES.F32,
    written_architecture: str | None = None,
    rope_factors: np.ndarray | None = None,
    **extra: str,
) -> None:
    config = model.config
    writer = gguf.GGUFWriter(path, written_architecture or architecture)
    writer.add_name("tiny")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(50000.0)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    for key, value in extra.items():
        writer.add_string(key.replace("__", "."), value)
    add_tokenizer(writer)
    add_tensors(writer, architecture, model, matrix_type)
    if rope_factors is not None:
        writer.add_tensor("rope_freqs.weight", rope_factors)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def add_tokenizer(writer: gguf.GGUFWriter) -> None:
    letters = [chr(ord("a") + index) for index in range(26)]
    tokens = ["<|end|>", "<|user|>", "Ġ", *letters, "ab", "Ġa"]
    tokens += [f"[unused{index}]" for index in range(64 - len(tokens))]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3] + [1] * 62)
    writer.add_token_merges(["a b", "Ġ a"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    writer.add_chat_template("{% for m in messages %}<|user|>{{ m['content'] }}{% endfor %}")


def add_tensors(
    writer: gguf.GGUFWriter, architecture: str, model: PreTrainedModel, matrix_type: TYPES
) -> None:
    config = model.config
    kind = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    name_map = gguf.get_tensor_name_map(kind, config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        values = tensor.numpy()
        if architecture == "llama" and "q_proj" in name:
            values = interleave_halves(values, config.num_attention_heads)
        if architecture == "llama" and "k_proj" in name:
            values = interleave_halves(values, config.num_key_value_heads)
        raw_type = matrix_type if values.ndim == 2 else TYPES.F32
        gguf_name = name_map.get_name(name, try_suffixes=(".weight", ".bias"))
        writer.add_tensor(gguf_name, quantize(values, raw_type), raw_dtype=raw_type)


def rounded(values: torch.Tensor, matrix_type: TYPES) -> torch.Tensor:
    """What a matrix is after storage; rows are quantised one by one, so their order is free."""
    array = values.numpy()
    if array.ndim == 1:
        return values
    return torch.from_numpy(np.array(dequantize(quantize(array, matrix_type), matrix_type)))


@pytest.mark.parametrize(
    ("architecture", "matrix_type"),
    [
        ("llama", TYPES.F32),
        ("llama", TYPES.F16),
        ("llama", TYPES.Q8_0),
        ("llama", TYPES.Q4_1),
        ("qwen2", TYPES.F16),
        ("qwen3", TYPES.F32),
    ],
)
def test_an_imported_model_is_its_source(
    tmp_path: Path, architecture: str, matrix_type: TYPES
) -> None:
    source = make_model(architecture)
    write_gguf(tmp_path / "m.gguf", architecture, source, matrix_type)
    folder = ModelFolder(import_gguf(tmp_path / "m.gguf", tmp_path / "cache"))
    expected = {name: rounded(t, matrix_type) for name, t in source.state_dict().items()}
    assert folder.names() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(folder.get(name), tensor), name
    source.load_state_dict(expected)
    loaded, report = AutoModelForCausalLM.from_pretrained(folder.path, output_loading_info=True)
    assert not any(report.values())
    tokens = torch.tensor([[3, 5, 8, 13, 21, 34]])
    assert torch.equal(loaded.eval()(tokens).logits, source(tokens).logits)


def test_a_tied_head_stays_tied(tmp_path: Path) -> None:
    write_gguf(tmp_path / "m.gguf", "llama", make_model("llama", tied=True))
    folder = ModelFolder(import_gguf(tmp_path / "m.gguf", tmp_path / "cache"))
    assert folder.config.tie_word_embeddings
    assert "lm_head.weight" not in folder.names()
    assert folder.config.architectures == ["LlamaForCausalLM"]


def test_the_tokenizer_comes_along_with_its_chat_template(tmp_path: Path) -> None:
    write_gguf(tmp_path / "m.gguf", "llama", make_model("llama"))
    tokenizer = resolve_model(tmp_path / "m.gguf", cache_folder=tmp_path / "cache").tokenizer()
    text = tokenizer.apply_chat_template([{"role": "user", "content": "ab"}], tokenize=False)
    assert text == "<|user|>ab"
    assert tokenizer(text)["input_ids"] == [1, 29]
    assert tokenizer("c a")["input_ids"] == [5, 30]
    assert tokenizer.eos_token == "<|end|>"


def test_the_name_of_a_word_splitter_becomes_that_splitter(tmp_path: Path) -> None:
    write_gguf(tmp_path / "m.gguf", "llama", make_model("llama"))
    path = import_gguf(tmp_path / "m.gguf", tmp_path / "cache")
    splitter = json.loads((path / "tokenizer.json").read_bytes())["pre_tokenizer"]
    assert [step["type"] for step in splitter["pretokenizers"]] == ["Digits", "ByteLevel"]


def test_a_second_import_converts_nothing(tmp_path: Path) -> None:
    write_gguf(tmp_path / "m.gguf", "llama", make_model("llama"))
    first = import_gguf(tmp_path / "m.gguf", tmp_path / "cache")
    stamp = (first / "model.safetensors").stat().st_mtime_ns
    (tmp_path / "m.gguf").rename(tmp_path / "renamed.gguf")
    assert import_gguf(tmp_path / "renamed.gguf", tmp_path / "cache") == first
    assert (first / "model.safetensors").stat().st_mtime_ns == stamp


def test_two_importers_at_once_find_one_result(tmp_path: Path) -> None:
    write_gguf(tmp_path / "m.gguf", "llama", make_model("llama"))
    found: list[Path] = []

    def run() -> None:
        found.append(import_gguf(tmp_path / "m.gguf", tmp_path / "cache"))

    threads = [threading.Thread(target=run) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(found)) == 1
    assert ModelFolder(found[0]).config.num_hidden_layers == 2


def test_an_unknown_architecture_is_refused_by_name(tmp_path: Path) -> None:
    write_gguf(tmp_path / "m.gguf", "llama", make_model("llama"), written_architecture="falcon")
    with pytest.raises(ModelError, match="architecture 'falcon'; known are llama, qwen2, qwen3"):
        import_gguf(tmp_path / "m.gguf", tmp_path / "cache")
    assert [path.suffix for path in (tmp_path / "cache").iterdir()] == [".lock"]


def test_rope_scaling_that_would_be_lost_is_refused(tmp_path: Path) -> None:
    scaling = {"llama__rope__scaling__type": "yarn"}
    write_gguf(tmp_path / "m.gguf", "llama", make_model("llama"), **scaling)
    with pytest.raises(ModelError, match="scales RoPE by 'yarn'"):
        import_gguf(tmp_path / "m.gguf", tmp_path / "cache")


def llama3_factors(factor: float, theta: float, size: int) -> np.ndarray:
    """How llama.cpp's converter computes the factors from Llama 3's rule."""
    factors = []
    for index in range(0, size, 2):
        wavelength = 2 * np.pi * theta ** (index / size)
        smooth = (8192 / wavelength - 1.0) / (4.0 - 1.0)
        if wavelength < 8192 / 4.0:
            factors.append(1.0)
        elif wavelength > 8192 / 1.0:
            factors.append(factor)
        else:
            factors.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(factors, dtype=np.float32)


def test_the_rope_rule_of_llama_3_is_put_back(tmp_path: Path) -> None:
    model = make_model("llama")
    factors = llama3_factors(32.0, 50000.0, 16)
    assert len(set(factors)) > 2
    write_gguf(tmp_path / "m.gguf", "llama", model, rope_factors=factors)
    folder = import_gguf(tmp_path / "m.gguf", tmp_path / "cache")
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    assert loaded.config.rope_parameters["factor"] == 32.0
    plain = 50000.0 ** (-torch.arange(8) / 8)
    expected = plain / torch.from_numpy(factors)
    torch.testing.assert_close(loaded.model.rotary_emb.inv_freq, expected)


def test_rope_factors_of_another_rule_are_refused(tmp_path: Path) -> None:
    factors = llama3_factors(32.0, 50000.0, 16)
    factors[-2] *= 1.01
    write_gguf(tmp_path / "m.gguf", "llama", make_model("llama"), rope_factors=factors)
    with pytest.raises(ModelError, match="do not follow Llama 3's rule"):
        import_gguf(tmp_path / "m.gguf", tmp_path / "cache")


@pytest.mark.parametrize("change", ["missing", "extra"])
def test_a_missing_or_extra_tensor_is_named(tmp_path: Path, change: str) -> None:
    model = make_model("llama")
    if change == "missing":
        del model.model.layers[1].mlp.up_proj.weight
        message = r"lacks the tensors \['blk\.1\.ffn_up\.weight'\]"
    else:
        layer = model.model.layers[1].self_attn
        layer.q_proj.bias = torch.nn.Parameter(torch.zeros(64))
        message = r"no place for: \['blk\.1\.attn_q\.bias'\]"
    write_gguf(tmp_path / "m.gguf", "llama", model)
    with pytest.raises(ModelError, match=message):
        import_gguf(tmp_path / "m.gguf", tmp_path / "cache")


def test_a_tensor_of_another_shape_is_named(tmp_path: Path) -> None:
    model = make_model("llama")
    model.model.layers[0].mlp.down_proj.weight = torch.nn.Parameter(torch.zeros(64, 32))
    write_gguf(tmp_path / "m.gguf", "llama", model)
    with pytest.raises(ModelError, match=r"blk\.0\.ffn_down\.weight is \(64, 32\), not"):
        import_gguf(tmp_path / "m.gguf", tmp_path / "cache")


@pytest.mark.parametrize("content", [b"", b"GGUF", b"not a model" * 40])
def test_what_is_no_gguf_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "m.gguf").write_bytes(content)
    with pytest.raises(ModelError, match="not a GGUF file or is truncated"):
        import_gguf(tmp_path / "m.gguf", tmp_path / "cache")


@pytest.mark.parametrize("share", [0.1, 0.5, 0.99])
def test_a_truncated_gguf_is_refused(tmp_path: Path, share: float) -> None:
    write_gguf(tmp_path / "m.gguf", "llama", make_model("llama"))
    data = (tmp_path / "m.gguf").read_bytes()
    (tmp_path / "m.gguf").write_bytes(data[: int(len(data) * share)])
    with pytest.raises(ModelError, match="truncated"):
        import_gguf(tmp_path / "m.gguf", tmp_path / "cache")


def test_a_missing_gguf_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"nothing\.gguf is not a file"):
        resolve_model(tmp_path / "nothing.gguf", cache_folder=tmp_path)


def test_a_cache_that_cannot_be_written_is_a_storage_error(tmp_path: Path) -> None:
    write_gguf(tmp_path / "m.gguf", "llama", make_model("llama"))
    (tmp_path / "cache").touch()
    with pytest.raises(StorageError, match="cache"):
        import_gguf(tmp_path / "m.gguf", tmp_path / "cache")
