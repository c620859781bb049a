"""LoRA on parts: keys, seeds, several names on one part, gradients and states."""

import itertools
import math
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from torch import Tensor
from transformers import PreTrainedModel

from cutlayer.errors import ConfigError, ModelError
from cutlayer.model import lora
from cutlayer.model.adapters import (
    Adapter,
    AdapterSettings,
    attach,
    base_only,
    initial_state,
    layout,
    layout_of,
)
from cutlayer.model.optimizer import AdamWSettings, PartOptimizer
from cutlayer.model.partition import Part
from cutlayer.settings import parse_settings
from tests.tiny_models import tiny_model
from tests.unit.model.stand_in import PartView, views

TOKENS = torch.tensor([[5, 6, 7, 8, 9, 200, 3]])
PEFT_WARNS = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")
SETTINGS = AdapterSettings(rank=3, alpha=6.0)


@pytest.fixture
def model(tmp_path: Path) -> PreTrainedModel:
    """A tiny llama of four blocks."""
    return tiny_model("llama", tmp_path)[1]


def stir(adapter: Adapter, seed: int = 7) -> None:
    generator = torch.Generator().manual_seed(seed)
    adapter.load(
        {key: torch.randn(v.shape, generator=generator) * 0.2 for key, v in adapter.state().items()}
    )


def logits_of(model: PreTrainedModel) -> Tensor:
    return model(TOKENS).logits.detach()


@PEFT_WARNS
@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox", "phi3"])
def test_the_parts_together_have_the_keys_of_a_peft_adapter(family: str, tmp_path: Path) -> None:
    model = tiny_model(family, tmp_path)[1]
    peft_model = get_peft_model(
        tiny_model(family, tmp_path)[1],
        LoraConfig(r=3, target_modules="all-linear", fan_in_fan_out=family == "gpt2"),
    )
    expected = get_peft_model_state_dict(peft_model)
    state = {}
    for part in views(model, 1, 3):
        state |= attach(part, SETTINGS).state()
    assert state.keys() == expected.keys()
    assert all(state[key].shape == expected[key].shape for key in state)


def test_fresh_weights_change_no_output(model: PreTrainedModel) -> None:
    before = logits_of(model)
    for part in views(model, 1, 3):
        attach(part, SETTINGS)
    assert torch.equal(logits_of(model), before)


def test_fresh_weights_do_not_depend_on_the_cut_nor_on_the_global_generator(
    tmp_path: Path,
) -> None:
    states = []
    for lower, upper in [(1, 3), (0, 1), (2, 4)]:
        torch.manual_seed(lower)
        before = torch.get_rng_state()
        state = {}
        for part in views(tiny_model("llama", tmp_path)[1], lower, upper):
            torch.set_rng_state(before)
            state |= attach(part, SETTINGS).state()
            assert torch.equal(torch.get_rng_state(), before)
        states.append(state)
    for state in states[1:]:
        assert state.keys() == states[0].keys()
        assert all(torch.equal(state[key], states[0][key]) for key in state)


def test_another_seed_or_layer_gives_other_weights_of_peft_s_spread(
    model: PreTrainedModel,
) -> None:
    part = views(model, 0, 4)[1]
    first = attach(part, SETTINGS, "first").state()
    other = attach(part, SETTINGS.model_copy(update={"seed": 1}), "other").state()
    drawn = [key for key in first if "lora_A" in key]
    assert not any(torch.equal(first[key], other[key]) for key in drawn)
    assert len({first[key].sum().item() for key in drawn}) == len(drawn)
    queries = torch.cat([first[key] for key in drawn if "q_proj" in key])
    bound = 1 / math.sqrt(32)
    assert queries.abs().max() <= bound
    assert queries.std() == pytest.approx(bound / math.sqrt(3), rel=0.1)


def test_only_adapter_weights_are_trained(model: PreTrainedModel) -> None:
    for part in views(model, 1, 3):
        adapter = attach(part, SETTINGS)
        trained = {id(p) for p in part.parameters() if p.requires_grad}
        assert trained == {id(p) for p in adapter.parameters()}
        assert trained


def test_a_part_without_blocks_gets_an_empty_adapter(model: PreTrainedModel) -> None:
    adapter = attach(views(model, 0, 3)[0], SETTINGS)
    assert adapter.parameters() == []
    assert adapter.state() == {}
    assert adapter.sq_norm() == 0.0
    adapter.load({})
    adapter.activate()
    adapter.remove()


def test_a_part_that_the_settings_leave_out_is_frozen(model: PreTrainedModel) -> None:
    settings = SETTINGS.model_copy(update={"parts": [Part.TAIL]})
    head, trunk, tail = (attach(part, settings) for part in views(model, 1, 3))
    assert head.state() == trunk.state() == {}
    assert len(tail.state()) == 14


@PEFT_WARNS
@pytest.mark.parametrize(
    ("targets", "count"),
    [
        (["q_proj", "v_proj"], 16),
        (["self_attn.q_proj"], 8),
        (["layers.2.mlp.up_proj"], 2),
        (["model.layers.0.mlp.up_proj", "k_proj"], 10),
    ],
)
def test_targets_select_layers_as_peft_does(
    targets: list[str], count: int, model: PreTrainedModel, tmp_path: Path
) -> None:
    settings = AdapterSettings(rank=3, targets=targets)
    state = {}
    for part in views(model, 1, 3):
        state |= attach(part, settings).state()
    peft_model = get_peft_model(
        tiny_model("llama", tmp_path)[1], LoraConfig(r=3, target_modules=targets)
    )
    assert state.keys() == get_peft_model_state_dict(peft_model).keys()
    assert len(state) == count


@pytest.mark.parametrize("wrong", ["q_prj", "lm_head", "embed_tokens", "input_layernorm"])
def test_a_target_that_fits_no_layer_is_refused(wrong: str, model: PreTrainedModel) -> None:
    settings = AdapterSettings(targets=["q_proj", wrong])
    with pytest.raises(ModelError, match=rf"\['{wrong}'\] fit no linear layer.*q_proj"):
        attach(views(model, 1, 3)[1], settings)


def test_several_adapters_take_turns_on_one_part(model: PreTrainedModel) -> None:
    part = views(model, 0, 4)[1]
    before = logits_of(model)
    one = attach(part, SETTINGS, "one")
    stir(one, 1)
    with_one = logits_of(model)
    two = attach(part, AdapterSettings(rank=2, targets=["q_proj"]), "two")
    assert torch.equal(logits_of(model), before)
    stir(two, 2)
    with_two = logits_of(model)
    one.activate()
    assert torch.equal(logits_of(model), with_one)
    two.activate()
    assert torch.equal(logits_of(model), with_two)
    assert not torch.equal(with_one, with_two)


def test_base_only_computes_as_the_base_model_and_restores(model: PreTrainedModel) -> None:
    part = views(model, 0, 4)[1]
    before = logits_of(model)
    adapter = attach(part, SETTINGS)
    stir(adapter)
    adapted = logits_of(model)
    with base_only(part):
        assert torch.equal(logits_of(model), before)
        with base_only(part):
            pass
        assert torch.equal(logits_of(model), before)
    assert torch.equal(logits_of(model), adapted)
    assert not torch.equal(before, adapted)


def test_a_graph_keeps_its_gradients_when_another_adapter_comes_and_goes(
    model: PreTrainedModel,
) -> None:
    part = views(model, 0, 4)[1]
    one = attach(part, SETTINGS, "one")
    stir(one)
    model(TOKENS).logits.square().sum().backward()
    expected = one.sq_norm()
    one.scale_grads(0.0)
    assert one.sq_norm() == 0.0
    graph = model(TOKENS).logits.square().sum()
    two = attach(part, SETTINGS, "two")
    two.activate()
    model(TOKENS)
    two.remove()
    graph.backward()
    assert one.sq_norm() == expected
    assert expected > 0


def test_a_removed_adapter_leaves_the_base_model(model: PreTrainedModel) -> None:
    part = views(model, 0, 4)[1]
    before = logits_of(model)
    adapter = attach(part, SETTINGS, "one")
    stir(adapter)
    adapter.remove()
    assert torch.equal(logits_of(model), before)
    assert not any(p.requires_grad for p in part.parameters())
    again = attach(part, SETTINGS, "one")
    assert len(again.parameters()) == 4 * 14


def test_removing_one_adapter_leaves_the_active_one(model: PreTrainedModel) -> None:
    part = views(model, 0, 4)[1]
    one, two = attach(part, SETTINGS, "one"), attach(part, SETTINGS, "two")
    stir(two)
    expected = logits_of(model)
    one.remove()
    assert torch.equal(logits_of(model), expected)


@pytest.mark.parametrize("name", ["", "a.b", "a/b"])
def test_a_malformed_name_is_refused(name: str, model: PreTrainedModel) -> None:
    with pytest.raises(ModelError, match="malformed"):
        attach(views(model, 1, 3)[1], SETTINGS, name)


def test_a_taken_name_is_refused(model: PreTrainedModel) -> None:
    part = views(model, 1, 3)[1]
    attach(part, SETTINGS, "one")
    with pytest.raises(ModelError, match="'one' is taken"):
        attach(part, SETTINGS, "one")


def attached(model: PreTrainedModel) -> Adapter:
    return attach(views(model, 1, 3)[1], SETTINGS)


def test_a_state_comes_back_and_is_a_copy(model: PreTrainedModel) -> None:
    adapter = attached(model)
    stir(adapter)
    saved = adapter.state()
    expected = {key: value.clone() for key, value in saved.items()}
    stir(adapter, 8)
    assert all(torch.equal(saved[key], expected[key]) for key in saved)
    adapter.load(saved)
    assert all(torch.equal(value, saved[key]) for key, value in adapter.state().items())


def test_parameters_come_in_the_order_of_the_state(model: PreTrainedModel) -> None:
    adapter = attached(model)
    state = adapter.state()
    assert list(state) == sorted(state)
    pairs = zip(adapter.parameters(), state.values(), strict=True)
    assert all(torch.equal(parameter, value) for parameter, value in pairs)


def test_a_state_that_does_not_fit_is_refused_and_changes_nothing(model: PreTrainedModel) -> None:
    adapter = attached(model)
    before = adapter.state()
    key = list(before)[-1]
    wrong = {name: torch.ones_like(value) for name, value in before.items()}
    with pytest.raises(ModelError, match=f"missing {key}"):
        adapter.load({name: value for name, value in wrong.items() if name != key})
    with pytest.raises(ModelError, match="unknown extra"):
        adapter.load(wrong | {"extra": torch.ones(1)})
    with pytest.raises(ModelError, match=rf"{key} is \(2, 2\), here"):
        adapter.load(wrong | {key: torch.ones(2, 2)})
    assert all(torch.equal(value, before[name]) for name, value in adapter.state().items())


def test_the_squared_norm_is_the_sum_over_all_gradients(model: PreTrainedModel) -> None:
    adapter = attached(model)
    stir(adapter)
    assert adapter.sq_norm() == 0.0
    model(TOKENS).logits.square().sum().backward()
    grads = [p.grad for p in adapter.parameters()]
    expected = torch.cat([grad.flatten() for grad in grads if grad is not None]).double()
    assert adapter.sq_norm() == pytest.approx(expected.square().sum().item(), rel=1e-12)
    adapter.scale_grads(0.5)
    assert adapter.sq_norm() == pytest.approx(expected.square().sum().item() / 4, rel=1e-6)


def test_weights_stay_float32_on_a_two_byte_base(tmp_path: Path) -> None:
    model = tiny_model("llama", tmp_path)[1].to(torch.bfloat16)
    part = views(model, 0, 4)[1]
    adapter = attach(part, SETTINGS)
    stir(adapter)
    assert {p.dtype for p in adapter.parameters()} == {torch.float32}
    logits = model(TOKENS).logits
    assert logits.dtype == torch.bfloat16
    logits.float().sum().backward()
    assert adapter.sq_norm() > 0


@pytest.mark.parametrize(
    "table",
    [{"rank": 0}, {"alpha": 0}, {"dropout": 1.0}, {"kind": "dora"}, {"parts": ["nose"]}],
)
def test_wrong_settings_are_refused(table: dict[str, object]) -> None:
    with pytest.raises(ConfigError):
        parse_settings(AdapterSettings, table, "adapter")


def test_settings_survive_as_plain_values() -> None:
    settings = AdapterSettings(targets=["q_proj"], parts=[Part.TRUNK])
    plain = settings.model_dump(mode="json")
    assert plain["parts"] == ["trunk"]
    assert parse_settings(AdapterSettings, plain, "adapter") == settings


def test_a_view_is_what_a_part_is(model: PreTrainedModel) -> None:
    trunk = views(model, 1, 3)[1]
    assert isinstance(trunk, PartView)
    assert list(trunk.block_range) == [1, 2]


def test_frozen_a_is_kept_in_the_state_but_not_trained(model: PreTrainedModel) -> None:
    part = views(model, 1, 3)[1]
    whole = attach(part, SETTINGS, "whole")
    half = attach(part, SETTINGS.model_copy(update={"train_a": False}), "b_only")
    again = attach(part, SETTINGS, "again")
    assert half.state().keys() == whole.state().keys()
    assert half.trained_keys() == [key for key in half.state() if "lora_B" in key]
    assert [p.requires_grad for p in half.parameters()] == [True] * len(half.trained_keys())
    assert len(again.parameters()) == len(whole.parameters()) == 2 * len(half.parameters())
    stir(half)
    half.activate()
    model(TOKENS).logits.square().sum().backward()
    assert half.sq_norm() > 0
    optimizer = PartOptimizer(half, AdamWSettings())
    before = half.state()
    optimizer.step(1.0, 0.1)
    changed = {key for key, value in half.state().items() if not torch.equal(value, before[key])}
    assert changed == set(half.trained_keys())
    optimizer.load(optimizer.state())


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_layout_and_fresh_weights_are_known_without_attaching(family: str, tmp_path: Path) -> None:
    for part in views(tiny_model(family, tmp_path)[1], 1, 3):
        shapes = layout_of(part, SETTINGS)
        adapter = attach(part, SETTINGS)
        assert shapes == layout(adapter) == layout_of(part, SETTINGS)
        fresh = initial_state(shapes, SETTINGS.seed)
        assert list(fresh) == list(adapter.state())
        assert all(torch.equal(value, fresh[key]) for key, value in adapter.state().items())
        assert not all(
            torch.equal(value, initial_state(shapes, 1)[key]) for key, value in fresh.items()
        )


def test_layout_of_a_part_that_is_not_trained_is_empty(model: PreTrainedModel) -> None:
    settings = SETTINGS.model_copy(update={"parts": [Part.TAIL]})
    assert layout_of(views(model, 1, 3)[1], settings) == {}


@pytest.mark.parametrize("is_first", [True, False])
def test_adapter_that_finds_no_memory_leaves_nothing_behind(
    model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch, is_first: bool
) -> None:
    _, trunk, _ = views(model, 1, 3)
    if not is_first:
        stir(attach(trunk, SETTINGS, "first"))
    before = logits_of(model)
    num_calls = itertools.count()

    def runs_out(*_: object) -> None:
        if next(num_calls) == 3:
            raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(lora, "_initialise", runs_out)
        with pytest.raises(MemoryError):
            attach(trunk, SETTINGS, "second")
    assert torch.equal(logits_of(model), before)
    trained = {n.split(".")[-2] for n, p in trunk.named_parameters() if p.requires_grad}
    assert trained == (set() if is_first else {"first"})
    second = attach(trunk, SETTINGS, "second")
    stir(second, seed=8)
    assert not torch.equal(logits_of(model), before)
