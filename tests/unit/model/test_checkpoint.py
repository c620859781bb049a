"""Reading one part: its own tensors alone, checked, hashed, converted and shared."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from cutlayer.errors import ConfigError, ModelError
from cutlayer.model import checkpoint
from cutlayer.model.checkpoint import check_dtype, load_client_parts, load_part, load_parts
from cutlayer.model.folder import ModelFolder
from cutlayer.model.manifest import manifest_of
from cutlayer.model.partition import Cut, Part
from cutlayer.model.rows import pack
from tests.tiny_models import edit_config, tiny_llama_folder, tiny_model

CUT = Cut(1, 3)
TEXT = [[3, 1, 4, 1, 5, 9, 2, 6]]


class CountingFolder(ModelFolder):
    """Remembers which tensors were read."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.read: list[str] = []

    def get(self, name: str) -> Tensor:
        self.read.append(name)
        return super().get(name)


def edit_tensors(folder: Path, edit: Callable[[dict[str, Tensor]], None]) -> Path:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path)
    return folder


def drop_tensor(folder: Path, name: str) -> None:
    def drop(tensors: dict[str, Tensor]) -> None:
        del tensors[name]

    edit_tensors(folder, drop)


@torch.no_grad()
def logits(folder: Path, dtype: str = "float32") -> Tensor:
    head, trunk, tail = load_parts(folder, CUT, dtype)
    rows = pack(TEXT)
    return tail(trunk(head(rows), rows), rows)


@pytest.mark.parametrize(
    ("part", "pieces"),
    [
        (Part.HEAD, ("model.embed_tokens.", "model.layers.0.")),
        (Part.TRUNK, ("model.layers.1.", "model.layers.2.")),
        (Part.TAIL, ("model.layers.3.", "model.norm.", "lm_head.")),
    ],
)
def test_a_part_reads_its_own_tensors_alone_and_once(
    part: Part, pieces: tuple[str, ...], tmp_path: Path
) -> None:
    source = CountingFolder(tiny_llama_folder(tmp_path))
    load_part(source, CUT, part)
    assert sorted(source.read) == sorted(n for n in source.names() if n.startswith(pieces))


def test_the_leaves_of_the_parts_together_are_those_of_the_whole_model(tmp_path: Path) -> None:
    folder = tiny_llama_folder(tmp_path)
    leaves: dict[str, str] = {}
    for part in load_parts(folder, CUT):
        assert all(leaves.get(name, leaf) == leaf for name, leaf in part.leaves.items())
        leaves.update(part.leaves)
    assert leaves == manifest_of(ModelFolder(folder)).leaves


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_leaves_do_not_depend_on_the_dtype_that_is_computed_in(dtype: str, tmp_path: Path) -> None:
    folder = tiny_llama_folder(tmp_path)
    trunk, converted = (load_part(folder, CUT, Part.TRUNK, d) for d in ("float32", dtype))
    assert trunk.leaves == converted.leaves
    assert {p.dtype for p in converted.parameters()} == {getattr(torch, dtype)}


@torch.no_grad()
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("family", ["llama", "gemma3_text", "deepseek_v3", "granite"])
def test_two_byte_parts_equal_the_unsplit_model_to_the_bit(
    family: str, dtype: str, tmp_path: Path
) -> None:
    folder, _ = tiny_model(family, tmp_path)
    unsplit = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    assert torch.equal(logits(folder, dtype), unsplit(torch.tensor(TEXT)).logits[0])


@pytest.mark.parametrize("family", ["qwen2", "gemma3_text", "granite"])
def test_client_parts_share_a_tied_embedding(family: str, tmp_path: Path) -> None:
    folder, _ = tiny_model(family, tmp_path)
    source = CountingFolder(folder)
    head, tail = load_client_parts(source, CUT)
    embedding = head.base.get_input_embeddings().weight
    assert tail.lm_head.weight is embedding
    assert source.read.count("model.embed_tokens.weight") == 1
    assert tail.leaves["embedding"] == head.leaves["embedding"]


def test_a_tail_alone_reads_a_tied_embedding_as_its_lm_head(tmp_path: Path) -> None:
    folder, unsplit = tiny_model("qwen2", tmp_path)
    tail = load_part(folder, CUT, Part.TAIL)
    assert torch.equal(tail.lm_head.weight, unsplit.lm_head.weight)
    assert tail.leaves == {
        name: leaf
        for name, leaf in manifest_of(ModelFolder(folder)).leaves.items()
        if name in {"config", "embedding", "block.3", "norm", "lm_head"}
    }


def test_a_tied_embedding_that_the_file_has_twice_is_held_once(tmp_path: Path) -> None:
    folder, _ = tiny_model("qwen2", tmp_path)

    def double(tensors: dict[str, Tensor]) -> None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()

    head, tail = load_client_parts(edit_tensors(folder, double), CUT)
    assert tail.lm_head.weight is head.base.get_input_embeddings().weight


@torch.no_grad()
def test_an_lm_head_that_differs_from_a_tied_embedding_is_kept(tmp_path: Path) -> None:
    folder, _ = tiny_model("qwen2", tmp_path)

    def differ(tensors: dict[str, Tensor]) -> None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] * 2

    expected = logits(folder) * 2
    assert torch.allclose(logits(edit_tensors(folder, differ)), expected, atol=1e-5)


@torch.no_grad()
def test_a_file_with_the_lm_head_alone_gives_the_embedding(tmp_path: Path) -> None:
    folder, _ = tiny_model("qwen2", tmp_path)

    def swap(tensors: dict[str, Tensor]) -> None:
        tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")

    expected = logits(folder)
    assert torch.equal(logits(edit_tensors(folder, swap)), expected)


@torch.no_grad()
def test_a_checkpoint_without_the_base_models_prefix_is_read(tmp_path: Path) -> None:
    folder, _ = tiny_model("gpt2", tmp_path)

    def strip(tensors: dict[str, Tensor]) -> None:
        for name in list(tensors):
            tensors[name.removeprefix("transformer.")] = tensors.pop(name)
        tensors["h.0.attn.bias"] = torch.ones(1, 1, 4, 4)

    expected = logits(folder)
    assert torch.equal(logits(edit_tensors(folder, strip)), expected)


def test_a_missing_tensor_is_named(tmp_path: Path) -> None:
    folder = tiny_llama_folder(tmp_path)
    name = "model.layers.2.self_attn.k_proj.weight"
    drop_tensor(folder, name)
    for part in Part:
        with pytest.raises(ModelError, match=f"lacks .*{name}"):
            load_part(folder, CUT, part)


def test_a_missing_lm_head_of_an_untied_model_is_named(tmp_path: Path) -> None:
    folder = tiny_llama_folder(tmp_path)
    drop_tensor(folder, "lm_head.weight")
    with pytest.raises(ModelError, match=r"lacks .*lm_head\.weight"):
        load_part(folder, CUT, Part.HEAD)


def test_a_missing_expert_is_noticed(tmp_path: Path) -> None:
    folder, _ = tiny_model("mixtral", tmp_path)
    name = "model.layers.1.block_sparse_moe.experts.2.w3.weight"
    drop_tensor(folder, name)
    with pytest.raises(ModelError, match=r"lacks .*model\.layers\.1\.mlp\.experts\.gate_up_proj"):
        load_part(folder, CUT, Part.TRUNK)


@pytest.mark.parametrize(
    "name", ["model.layers.1.self_attn.q_proj.bias", "model.layers.4.mlp.up_proj.weight", "x"]
)
def test_an_extra_tensor_is_named(name: str, tmp_path: Path) -> None:
    folder = tiny_llama_folder(tmp_path)
    edit_tensors(folder, lambda tensors: tensors.update({name: torch.zeros(2)}))
    with pytest.raises(ModelError, match=f"no place for: {name};"):
        load_part(folder, CUT, Part.HEAD)


def test_a_tensor_of_another_shape_is_named_with_both_shapes(tmp_path: Path) -> None:
    folder = tiny_llama_folder(tmp_path)
    edit_tensors(folder, lambda tensors: tensors.update({"model.norm.weight": torch.zeros(31)}))
    with pytest.raises(ModelError, match=r"model\.norm\.weight has shape \(31,\), .* \(32,\)"):
        load_part(folder, CUT, Part.TAIL)


def test_a_config_of_another_model_is_noticed(tmp_path: Path) -> None:
    folder = tiny_llama_folder(tmp_path)
    edit_config(folder, num_hidden_layers=3)
    with pytest.raises(ModelError, match=r"no place for: model\.layers\.3\."):
        load_part(folder, Cut(1, 2), Part.HEAD)


@pytest.mark.parametrize("dtype", ["float64", "int8", "fp32", torch.float64])
def test_an_unknown_dtype_is_refused_with_the_known_ones(
    dtype: str | torch.dtype, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="choose one of float32, bfloat16, float16"):
        load_part(tiny_llama_folder(tmp_path), CUT, Part.HEAD, dtype)


@pytest.mark.parametrize("device", ["cuda:99", "no-such-device"])
def test_a_device_that_is_not_there_is_refused(device: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"device={device} cannot be used here"):
        load_part(tiny_llama_folder(tmp_path), CUT, Part.HEAD, device=device)


def test_a_slow_dtype_is_warned_about_and_a_fast_one_is_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(checkpoint, "_cpu_flags", lambda: frozenset({"avx2"}))
    assert check_dtype("float32", "cpu") is None
    assert "no units for bfloat16" in str(check_dtype("bfloat16", "cpu"))
    monkeypatch.setattr(checkpoint, "_cpu_flags", lambda: frozenset({"avx512_bf16"}))
    assert check_dtype("bfloat16", "cpu") is None
    assert "no units for float16" in str(check_dtype("float16", "cpu"))


def test_float32_corrections_stay_float32_in_a_two_byte_model(tmp_path: Path) -> None:
    folder, _ = tiny_model("deepseek_v3", tmp_path)
    trunk = load_part(folder, CUT, Part.TRUNK, "bfloat16")
    kept = {n for n, t in trunk.state_dict().items() if t.dtype is torch.float32}
    assert kept == {f"base.layers.{i}.mlp.gate.e_score_correction_bias" for i in range(2)}


MEASURE = """
import sys, torch
from cutlayer.model.checkpoint import load_client_parts
from cutlayer.model.partition import Cut
def kib(key):
    lines = open("/proc/self/status").read().splitlines()
    return int(next(l for l in lines if l.startswith(key)).split()[1])
load_client_parts(sys.argv[1], Cut(1, 3))
for dtype in ("float32", "bfloat16"):
    open("/proc/self/clear_refs", "w").write("5")
    before = kib("VmRSS")
    parts = load_client_parts(sys.argv[2], Cut(1, 7), dtype)
    own = sum(p.nbytes for part in parts for p in part.parameters())
    print((kib("VmHWM") - before) * 1024 / own)
    del parts
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc")
def test_loading_takes_little_more_memory_than_the_tensors(tmp_path: Path) -> None:
    small = tiny_llama_folder(tmp_path / "small")
    sizes = {"hidden_size": 512, "intermediate_size": 6144, "num_hidden_layers": 8}
    large, _ = tiny_model("llama", tmp_path / "large", vocab_size=8192, dtype="bfloat16", **sizes)
    finished = subprocess.run(
        [sys.executable, "-c", MEASURE, str(small), str(large)],
        capture_output=True,
        text=True,
        check=True,
        # glibc keeps freed blocks of up to 32 MB for itself, which at this size hides the rest.
        env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"},
    )
    assert max(float(ratio) for ratio in finished.stdout.split()) <= 1.1
