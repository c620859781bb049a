"""Leaves, root and comparison; each property that a forger would try is a test."""

import hashlib
import json
from pathlib import Path

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from cutlayer.errors import ModelError, SpecMismatch
from cutlayer.model.folder import ModelFolder
from cutlayer.model.manifest import (
    MANIFEST_NAME,
    Manifest,
    hash_config,
    hash_leaf,
    leaf_of,
    manifest_of,
    merge,
    names_by_leaf,
    read_manifest,
    write_manifest,
)

X, Y = torch.arange(6.0).reshape(2, 3), torch.ones(4)


def llama_config(**changes: object) -> LlamaConfig:
    fields: dict[str, object] = {
        "vocab_size": 32,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
    }
    return LlamaConfig(**(fields | changes))


@pytest.fixture
def model_path(tmp_path: Path) -> Path:
    """A saved llama of three blocks."""
    torch.manual_seed(0)
    LlamaForCausalLM(llama_config()).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def leaves(num_blocks: int = 3) -> dict[str, str]:
    names = ["config", "embedding", *(f"block.{i}" for i in range(num_blocks)), "norm", "lm_head"]
    return {name: hashlib.sha256(name.encode()).hexdigest() for name in names}


@pytest.mark.parametrize(
    ("name", "leaf"),
    [
        ("model.embed_tokens.weight", "embedding"),
        ("transformer.wte.weight", "embedding"),
        ("wpe.weight", "embedding"),
        ("gpt_neox.embed_in.weight", "embedding"),
        ("model.layers.0.self_attn.q_proj.weight", "block.0"),
        ("model.layers.11.mlp.experts.3.up_proj.weight", "block.11"),
        ("transformer.h.7.attn.c_attn.bias", "block.7"),
        ("h.7.ln_1.weight", "block.7"),
        ("gpt_neox.layers.2.attention.bias", "block.2"),
        ("model.norm.weight", "norm"),
        ("transformer.ln_f.bias", "norm"),
        ("gpt_neox.final_layer_norm.weight", "norm"),
        ("lm_head.weight", "lm_head"),
        ("embed_out.weight", "lm_head"),
    ],
)
def test_a_tensor_name_tells_its_leaf(name: str, leaf: str) -> None:
    assert leaf_of(name) == leaf


def test_a_leaf_does_not_depend_on_the_order_of_its_tensors() -> None:
    assert hash_leaf([("a", X), ("b", Y)]) == hash_leaf(iter([("b", Y), ("a", X)]))


@pytest.mark.parametrize(
    "items",
    [
        [("a", Y), ("b", X)],
        [("ab", X), ("", Y)],
        [("a", X.reshape(3, 2)), ("b", Y)],
        [("a", X.reshape(6)), ("b", Y)],
        [("a", X.view(torch.int32)), ("b", Y)],
        [("a", X + 1e-7), ("b", Y)],
        [("a", X)],
        [("a", X), ("b", Y), ("c", torch.empty(0))],
        [],
    ],
)
def test_another_name_shape_dtype_or_value_is_another_leaf(
    items: list[tuple[str, torch.Tensor]],
) -> None:
    assert hash_leaf(items) != hash_leaf([("a", X), ("b", Y)])


def test_a_leaf_is_what_its_definition_says() -> None:
    def prefixed(piece: bytes) -> bytes:
        return len(piece).to_bytes(8, "little") + piece

    shape = b"".join(size.to_bytes(8, "little") for size in (2, 2, 3))
    tensor = hashlib.sha256(prefixed(b"float32") + shape + X.numpy().tobytes()).digest()
    expected = hashlib.sha256(b"cutlayer leaf 1" + prefixed(b"a") + tensor).hexdigest()
    assert hash_leaf([("a", X)]) == expected


def test_a_strided_tensor_hashes_as_its_values() -> None:
    assert hash_leaf([("a", X.T)]) == hash_leaf([("a", X.T.contiguous())])


def test_a_name_that_comes_twice_is_refused() -> None:
    with pytest.raises(ModelError, match="a comes twice"):
        hash_leaf([("a", X), ("a", X)])


def test_fields_that_decide_nothing_leave_the_config_hash() -> None:
    config = llama_config()
    same = llama_config(
        use_cache=False, dtype="bfloat16", eos_token_id=[1, 2], architectures=["LlamaForCausalLM"]
    )
    same._name_or_path = "elsewhere"
    same.transformers_version = "4.0"
    same._attn_implementation = "eager"
    assert hash_config(same) == hash_config(config)


@pytest.mark.parametrize(
    "changes",
    [
        {"rms_norm_eps": 1e-5},
        {"num_hidden_layers": 4},
        {"hidden_act": "gelu"},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
        {"tie_word_embeddings": True},
    ],
)
def test_fields_that_decide_the_computation_change_the_config_hash(
    changes: dict[str, object],
) -> None:
    assert hash_config(llama_config(**changes)) != hash_config(llama_config())


def test_a_config_hashes_alike_after_saving_and_loading(model_path: Path) -> None:
    assert hash_config(ModelFolder(model_path).config) == hash_config(llama_config())


def test_a_whole_folder_has_a_leaf_per_piece(model_path: Path) -> None:
    folder = ModelFolder(model_path)
    manifest = manifest_of(folder)
    assert list(manifest.leaves) == list(leaves())
    names = names_by_leaf(folder.names(), 3)
    assert sorted(name for group in names.values() for name in group) == sorted(folder.names())
    assert manifest.leaves["norm"] == hash_leaf(
        [("model.norm.weight", folder.get("model.norm.weight"))]
    )


def test_one_changed_value_changes_one_leaf_and_the_root(model_path: Path, tmp_path: Path) -> None:
    before = manifest_of(ModelFolder(model_path))
    model = LlamaForCausalLM.from_pretrained(model_path)
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[0, 0] += 1e-6
    model.save_pretrained(tmp_path / "changed")
    after = manifest_of(ModelFolder(tmp_path / "changed"))
    differing = [name for name in before.leaves if before.leaves[name] != after.leaves[name]]
    assert differing == ["block.1"]
    assert before.root() != after.root()
    with pytest.raises(SpecMismatch, match=r"block\.1 \(mine .*, theirs"):
        merge(before, after)


def test_a_tied_head_has_the_hash_of_no_tensors(tmp_path: Path) -> None:
    GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=8, n_head=2, vocab_size=16)).save_pretrained(
        tmp_path
    )
    assert manifest_of(ModelFolder(tmp_path)).leaves["lm_head"] == hash_leaf([])


def test_the_root_is_the_published_merkle_tree() -> None:
    table = leaves(1)

    def leaf(name: str) -> bytes:
        size = len(name).to_bytes(8, "little")
        return hashlib.sha256(b"\0" + size + name.encode() + bytes.fromhex(table[name])).digest()

    def node(left: bytes, right: bytes) -> bytes:
        return hashlib.sha256(b"\1" + left + right).digest()

    c, e, b, n, h = (leaf(name) for name in table)
    assert Manifest(table).root() == node(node(node(c, e), node(b, n)), h).hex()


def test_swapped_leaves_give_another_root() -> None:
    swapped = leaves()
    swapped["block.0"], swapped["block.1"] = swapped["block.1"], swapped["block.0"]
    assert Manifest(swapped).root() != Manifest(leaves()).root()


@pytest.mark.parametrize("missing", ["config", "block.1", "lm_head"])
def test_an_incomplete_manifest_has_no_root(missing: str) -> None:
    table = leaves()
    del table[missing]
    with pytest.raises(ModelError, match="incomplete"):
        Manifest(table).root()


def test_an_unknown_leaf_is_refused() -> None:
    with pytest.raises(ModelError, match=r"unknown \['block.01'\]"):
        Manifest(leaves() | {"block.01": "00"}).root()


def test_merging_takes_each_side_s_own_leaves() -> None:
    table = leaves()
    mine = Manifest({name: table[name] for name in ("config", "embedding", "block.0", "norm")})
    theirs = Manifest({name: table[name] for name in ("config", "block.1", "block.2", "lm_head")})
    assert merge(mine, theirs).root() == Manifest(table).root()


def test_merging_names_every_difference() -> None:
    other = leaves() | {"norm": "00" * 32, "block.2": "11" * 32}
    with pytest.raises(SpecMismatch, match=r"block\.2 .*norm"):
        merge(Manifest(leaves()), Manifest(other))


def test_a_manifest_survives_its_file(tmp_path: Path) -> None:
    path = write_manifest(Manifest(leaves()), tmp_path)
    assert path.name == MANIFEST_NAME
    assert read_manifest(tmp_path) == Manifest(leaves())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"root": "00"}, "changed by hand"),
        ({"format": 2}, "another format"),
        ({"leaves": {"config": "zz"}}, "not a manifest"),
        ({"leaves": {"config": "00"}}, "incomplete"),
        ({"leaves": []}, "not a manifest"),
    ],
)
def test_a_changed_manifest_file_is_refused(
    tmp_path: Path, change: dict[str, object], message: str
) -> None:
    path = write_manifest(Manifest(leaves()), tmp_path)
    path.write_text(json.dumps(json.loads(path.read_bytes()) | change))
    with pytest.raises(ModelError, match=message):
        read_manifest(tmp_path)


def test_a_missing_manifest_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=f"cannot read .*{MANIFEST_NAME}"):
        read_manifest(tmp_path)
