"""Cuts, parts and the architectures that cannot be cut."""

import copy
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, PreTrainedConfig

from cutlayer.errors import ConfigError, DataError, ModelError
from cutlayer.model.checkpoint import load_part, load_parts
from cutlayer.model.families import meta_model, read_layout
from cutlayer.model.partition import Cut, Head, Part, Tail, Trunk, build_part
from cutlayer.model.probe import check_blocks
from cutlayer.model.rows import Rows, pack
from tests.tiny_models import COMMON, FAMILIES, tiny_llama_folder, tiny_model

Parts = tuple[Head, Trunk, Tail]


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Parts:
    return load_parts(tiny_llama_folder(tmp_path_factory.mktemp("model")), Cut(1, 3))


def config_of(family: str, **settings: object) -> PreTrainedConfig:
    return AutoConfig.for_model(family, **settings)


@pytest.mark.parametrize(("lower", "upper"), [(-1, 2), (2, 2), (3, 1), (0, 0)])
def test_a_cut_without_a_trunk_is_refused(lower: int, upper: int) -> None:
    with pytest.raises(ConfigError, match=f"cut.lower={lower}, cut.upper={upper}"):
        Cut(lower, upper)


def test_a_cut_beyond_the_model_names_the_model_and_the_limit(tmp_path: Path) -> None:
    expected = "cut.upper=5 exceeds the model's 4 blocks; choose at most 4"
    with pytest.raises(ConfigError, match=expected):
        load_parts(tiny_llama_folder(tmp_path), Cut(1, 5))


def test_the_three_parts_hold_every_block_once(parts: Parts) -> None:
    assert [list(part.block_range) for part in parts] == [[0], [1, 2], [3]]
    assert [len(part.base.layers) for part in parts] == [1, 2, 1]
    assert [part.part for part in parts] == list(Part)


def test_only_its_owner_holds_embedding_norm_and_lm_head(parts: Parts) -> None:
    head, trunk, tail = (
        {name.split(".layers.")[0] for name, _ in p.named_parameters()} for p in parts
    )
    assert head == {"base", "base.embed_tokens.weight"}
    assert trunk == {"base"}
    assert tail == {"base", "base.norm.weight", "lm_head.weight"}


def test_global_names_are_those_of_the_unsplit_model(tmp_path: Path) -> None:
    folder, unsplit = tiny_model("gpt2", tmp_path)
    ours = {
        part.global_name(name): tensor
        for part in load_parts(folder, Cut(1, 3))
        for name, tensor in part.state_dict().items()
    }
    theirs = unsplit.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    trunk = load_part(folder, Cut(1, 3), Part.TRUNK)
    assert trunk.global_name("base.h.1") == "transformer.h.2"


def test_parts_know_the_config_of_the_whole_model(parts: Parts) -> None:
    assert [part.config.num_hidden_layers for part in parts] == [4, 4, 4]
    assert [part.hidden_size for part in parts] == [32, 32, 32]


def test_parts_are_frozen_and_in_eval_mode(parts: Parts) -> None:
    for part in parts:
        assert not part.training
        assert not any(parameter.requires_grad for parameter in part.parameters())


def test_gradients_reach_the_input_of_trunk_and_tail(parts: Parts) -> None:
    _, trunk, tail = parts
    h_ND = torch.randn(3, 32, requires_grad=True)
    rows = Rows(lengths=(2, 1))
    tail(trunk(h_ND, rows), rows).sum().backward()
    assert h_ND.grad is not None
    assert h_ND.grad.abs().min() > 0


@torch.no_grad()
def test_the_tail_computes_selected_places_alone(parts: Parts) -> None:
    tail = parts[2]
    y_ND, rows = torch.randn(5, 32), Rows(lengths=(2, 3))
    places = torch.tensor([4, 1])
    assert torch.allclose(tail(y_ND, rows, select_N=places), tail(y_ND, rows)[places], atol=1e-6)


@torch.no_grad()
def test_a_replaced_lm_head_is_the_one_that_is_used(tmp_path: Path) -> None:
    tail = load_part(tiny_llama_folder(tmp_path), Cut(1, 3), Part.TAIL)
    tail.lm_head = torch.nn.Linear(32, 7)
    assert tail(torch.randn(2, 32), Rows(lengths=(2,))).shape == (2, 7)


def test_a_row_beyond_the_context_is_refused(parts: Parts) -> None:
    with pytest.raises(DataError, match="row of 129 tokens exceeds the model's context of 128"):
        parts[0](pack([[1, 2], [0] * 129]))


@pytest.mark.parametrize("token", [-1, 264])
def test_a_token_outside_the_vocabulary_is_refused(parts: Parts, token: int) -> None:
    with pytest.raises(DataError, match=f"token {token} is not in the model's vocabulary of 264"):
        parts[0](pack([[1, token]]))


def test_a_head_without_tokens_is_refused(parts: Parts) -> None:
    with pytest.raises(ConfigError, match="the head needs rows with tokens"):
        parts[0](Rows(lengths=(2,)))


@pytest.mark.parametrize("shape", [(3, 32), (2, 31), (1, 2, 32)])
def test_hidden_states_that_do_not_fit_the_rows_are_refused(
    parts: Parts, shape: tuple[int, ...]
) -> None:
    with pytest.raises(ConfigError, match="trunk got"):
        parts[1](torch.zeros(shape), Rows(lengths=(2,)))


REFUSED = {
    "bart": "is an encoder-decoder",
    "bloom": "has attention of its own",
    "codegen": "has attention of its own",
    "falcon": "has attention of its own",
    "gptj": "has attention of its own",
    "llama4_text": "has blocks of type chunked_attention",
    "mamba": "has blocks of type linear_attention",
    "minimax": "has blocks of type linear_attention",
    "mpt": "has attention of its own",
    "opt": "OPTModel has 0 lists of 12 blocks",
    "qwen3_next": "has blocks of type linear_attention",
    "rwkv": "keeps a recurrent state",
    "t5": "is an encoder-decoder",
}


@pytest.mark.parametrize("family", sorted(REFUSED))
def test_an_architecture_that_cannot_be_cut_is_refused_by_what_it_lacks(family: str) -> None:
    with pytest.raises(ModelError, match=REFUSED[family]):
        read_layout(meta_model(config_of(family)))


def test_a_convolution_in_a_block_is_refused() -> None:
    model = meta_model(config_of("llama", **COMMON))
    model.model.layers[2].extra = torch.nn.Conv1d(1, 1, 1)
    with pytest.raises(ModelError, match=r"2\.extra \(Conv1d\) mixes tokens without attention"):
        read_layout(model)


def test_weights_that_no_part_would_own_are_refused() -> None:
    model = meta_model(config_of("llama", **COMMON))
    model.model.adapter = torch.nn.Linear(1, 1)
    with pytest.raises(ModelError, match=r"LlamaModel\.adapter holds weights that belong to no"):
        read_layout(model)


REFUSED_BLOCKS = {
    "diffllama": "2 attention calls in 1 blocks",
    "doge": "builds masks of its own",
    "nemotron": "does not get keyword arguments",
}


@pytest.mark.parametrize("family", sorted(REFUSED_BLOCKS))
def test_blocks_that_attend_in_their_own_way_are_refused(family: str) -> None:
    part = build_part(config_of(family, **COMMON), Cut(1, 2), Part.TRUNK)
    with pytest.raises(ModelError, match=REFUSED_BLOCKS[family]):
        check_blocks(part)


def test_a_norm_before_the_first_block_is_refused(tmp_path: Path) -> None:
    config = config_of("nanochat", **COMMON)
    model = meta_model(config).to_empty(device="cpu")
    model.save_pretrained(tmp_path)
    for part in Part:
        with pytest.raises(ModelError, match="NanoChatModel changes hidden states before"):
            load_part(tmp_path, Cut(1, 3), part)


def test_a_scale_that_no_table_entry_undoes_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, _ = tiny_model("granite", tmp_path)
    monkeypatch.delitem(dict_of_families(), "granite")
    with pytest.raises(ModelError, match="GraniteModel changes hidden states before"):
        load_part(folder, Cut(1, 3), Part.TRUNK)


def dict_of_families() -> dict[str, object]:
    from cutlayer.model import families

    assert isinstance(families.FAMILIES, dict)
    return families.FAMILIES


def test_learned_positions_without_a_table_entry_are_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delitem(dict_of_families(), "gpt2")
    with pytest.raises(ModelError, match=r"GPT2Model\.wpe holds weights that belong to no part"):
        read_layout(meta_model(config_of("gpt2")))


def test_blocks_that_share_keys_and_values_are_refused() -> None:
    config = config_of("gemma4_text", num_kv_shared_layers=2)
    with pytest.raises(ModelError, match="shares keys and values between blocks"):
        read_layout(meta_model(config))


def test_a_quantised_checkpoint_is_refused() -> None:
    config = config_of("llama", **COMMON, quantization_config={"quant_method": "gptq"})
    with pytest.raises(ModelError, match="quantised; dequantise it first"):
        meta_model(config)


def test_an_impossible_config_is_refused() -> None:
    config = config_of("llama", **{**COMMON, "hidden_act": "no_such_function"})
    with pytest.raises(ModelError, match="transformers cannot build 'llama'"):
        meta_model(config)


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_building_a_part_leaves_the_config_alone(family: str) -> None:
    settings = {k: v for k, v in {**COMMON, **FAMILIES[family]}.items() if v is not None}
    config = config_of(family, **settings)
    before = copy.deepcopy(config.to_dict())
    build_part(config, Cut(1, 3), Part.TRUNK)
    assert config.to_dict() == before
