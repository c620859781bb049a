"""Every kind of adapter, and all together: one conformance suite over what is registered."""

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from cutlayer.errors import ConfigError, DataError, ModelError
from cutlayer.model.adapter_kinds import KINDS
from cutlayer.model.adapter_slots import Segment
from cutlayer.model.adapters import (
    Adapter,
    AdapterSettings,
    AdapterState,
    attach,
    base_only,
    initial_state,
    layout,
    layout_of,
    use_segments,
)
from cutlayer.model.checkpoint import load_parts
from cutlayer.model.partition import Cut, Part, PartModule, Trunk
from cutlayer.model.rows import Rows, pack
from cutlayer.settings import parse_settings, settings_digest
from tests.tiny_models import tiny_model
from tests.unit.model.test_adapters import stir

ROW = [5, 6, 7, 8, 9, 200, 3]
COMBINATIONS = [*([kind] for kind in KINDS), list(KINDS)]
by_kinds = pytest.mark.parametrize("kinds", COMBINATIONS, ids="+".join)
Parts = Sequence[PartModule]


def _settings(kinds: Sequence[str], **changes: object) -> AdapterSettings:
    table = {
        "kinds": list(kinds),
        "rank": 3,
        "prefix": {"num_virtual_tokens": 4},
        "sparse": {"qkv_ratio": 0.5, "dense_ratio": 0.5},
    }
    return parse_settings(AdapterSettings, table | changes, "adapter")


def _parts(tmp_path: Path, family: str = "llama", cut: Cut = Cut(1, 3)) -> Parts:  # noqa: B008
    return load_parts(tiny_model(family, tmp_path)[0], cut)


def _logits(parts: Parts, rows: Rows | None = None) -> Tensor:
    head, trunk, tail = parts
    rows = rows or pack([ROW, ROW[:3]])
    logits: Tensor = tail(trunk(head(rows), rows), rows)
    return logits


def _joined(adapters: Sequence[Adapter]) -> AdapterState:
    return {key: value for adapter in adapters for key, value in adapter.state().items()}


@by_kinds
def test_keys_and_fresh_weights_do_not_depend_on_the_cut(kinds: list[str], tmp_path: Path) -> None:
    states = []
    for cut in (Cut(1, 3), Cut(0, 1), Cut(2, 4)):
        before = torch.get_rng_state()
        parts = _parts(tmp_path, cut=cut)
        torch.set_rng_state(before)
        states.append(_joined([attach(part, _settings(kinds)) for part in parts]))
        assert torch.equal(torch.get_rng_state(), before)
    for state in states[1:]:
        assert state.keys() == states[0].keys()
        assert all(torch.equal(state[key], states[0][key]) for key in state)
    owners = {key: [kind for kind in KINDS if KINDS.get(kind).owns(key)] for key in states[0]}
    assert {kind for found in owners.values() for kind in found} == set(kinds)
    assert {len(found) for found in owners.values()} == {1}


@pytest.mark.parametrize(
    ("family", "kinds"), [("llama", COMBINATIONS[-1]), ("gpt2", COMBINATIONS[-1])]
)
def test_layout_and_fresh_weights_are_known_without_attaching(
    family: str, kinds: list[str], tmp_path: Path
) -> None:
    for part in _parts(tmp_path, family):
        shapes = layout_of(part, _settings(kinds))
        adapter = attach(part, _settings(kinds))
        assert shapes == layout(adapter) == layout_of(part, _settings(kinds))
        fresh = initial_state(shapes, 0)
        assert list(fresh) == list(adapter.state())
        assert all(torch.equal(value, fresh[key]) for key, value in adapter.state().items())
        assert adapter.kinds == kinds


@by_kinds
def test_only_the_adapter_learns_and_every_weight_of_it_does(
    kinds: list[str], tmp_path: Path
) -> None:
    parts = _parts(tmp_path)
    adapters = [attach(part, _settings(kinds)) for part in parts]
    for seed, adapter in enumerate(adapters):
        stir(adapter, seed)
    trained = {id(p) for part in parts for p in part.parameters() if p.requires_grad}
    assert trained == {id(p) for adapter in adapters for p in adapter.parameters()}
    _logits(parts).square().sum().backward()
    grads = [p.grad for adapter in adapters for p in adapter.parameters()]
    assert all(grad is not None and grad.abs().sum() > 0 for grad in grads)
    assert all(p.grad is None for part in parts for p in part.parameters() if id(p) not in trained)


@by_kinds
def test_a_state_comes_back_and_removal_leaves_the_base_model(
    kinds: list[str], tmp_path: Path
) -> None:
    parts = _parts(tmp_path)
    before = _logits(parts)
    adapters = [attach(part, _settings(kinds)) for part in parts]
    for seed, adapter in enumerate(adapters):
        stir(adapter, seed)
    saved, adapted = [adapter.state() for adapter in adapters], _logits(parts)
    assert not torch.equal(adapted, before)
    with base_only(parts[0]), base_only(parts[1]), base_only(parts[2]):
        assert torch.equal(_logits(parts), before)
    for adapter, state in zip(adapters, saved, strict=True):
        stir(adapter, 9)
        adapter.load(state)
    assert torch.equal(_logits(parts), adapted)
    for adapter in adapters:
        adapter.remove()
    assert torch.equal(_logits(parts), before)
    assert not any(p.requires_grad for part in parts for p in part.parameters())
    assert [len(list(part.buffers())) for part in parts] == [
        len(list(part.buffers())) for part in _parts(tmp_path)
    ]
    again = [attach(part, _settings(kinds)) for part in parts]
    assert _joined(again).keys() == {key for state in saved for key in state}


def _random(num_tokens: int, seed: int = 0) -> Tensor:
    return torch.randn(num_tokens, 32, generator=torch.Generator().manual_seed(seed))


def _gradients(adapters: Sequence[Adapter], y_ND: Tensor, grad_ND: Tensor) -> list[Tensor]:
    parameters = [p for a in adapters for p in a.parameters()]
    return list(torch.autograd.grad(y_ND, parameters, grad_ND))


def _run(trunk: Trunk, segments: Sequence[Segment], h_ND: Tensor, lengths: Sequence[int]) -> Tensor:
    with use_segments(trunk, segments):
        y_ND: Tensor = trunk(h_ND, Rows(lengths=tuple(lengths)))
    return y_ND


def _distance(found: Tensor, expected: Tensor) -> float:
    found, expected = found.detach(), expected.detach()
    return float(torch.linalg.vector_norm(found - expected) / torch.linalg.vector_norm(expected))


@by_kinds
@pytest.mark.parametrize(
    ("family", "lengths"), [("llama", (4, 4)), ("gpt2", (40, 3)), ("mistral", (40, 3))]
)
def test_each_client_of_a_call_is_as_if_it_were_alone(
    kinds: list[str], family: str, lengths: tuple[int, int], tmp_path: Path
) -> None:
    trunk = _parts(tmp_path, family)[1]
    assert isinstance(trunk, Trunk)
    first = attach(trunk, _settings(kinds), "first")
    # Another client: other sizes, and rows of its own.
    sizes = {"rank": 2, "prefix": {"num_virtual_tokens": 2}, "sparse": {"choose": "smallest"}}
    second = attach(trunk, _settings(kinds, **sizes), "second")
    names = ["first", None, "second"]
    for seed, adapter in enumerate((first, second)):
        stir(adapter, seed)
    row_lengths = [lengths[0], 2, 2, lengths[1]]
    sizes_of = [lengths[0], 4, lengths[1]]
    segments = [
        Segment(adapter=name, num_tokens=n) for name, n in zip(names, sizes_of, strict=True)
    ]
    h_ND, grad_ND = _random(sum(sizes_of)), _random(sum(sizes_of), 9)
    together = _run(trunk, segments, h_ND, row_lengths)
    grads = _gradients([first, second], together, grad_ND)
    rows_of = [[lengths[0]], [2, 2], [lengths[1]]]
    begin, alone_grads = 0, []
    for segment, own_rows in zip(segments, rows_of, strict=True):
        own = slice(begin, begin + segment.num_tokens)
        alone = _run(trunk, [segment], h_ND[own], own_rows)
        assert _distance(together[own], alone) < 2e-5
        if segment.adapter is not None:
            adapter = first if segment.adapter == "first" else second
            alone_grads += _gradients([adapter], alone, grad_ND[own])
        begin = own.stop
    assert _distance(*(torch.cat([g.flatten() for g in x]) for x in (grads, alone_grads))) < 2e-5


@by_kinds
def test_bad_values_of_one_client_reach_no_other_gradient(kinds: list[str], tmp_path: Path) -> None:
    trunk = _parts(tmp_path)[1]
    assert isinstance(trunk, Trunk)
    adapters = [attach(trunk, _settings(kinds), name) for name in ("first", "second")]
    for seed, adapter in enumerate(adapters):
        stir(adapter, seed)
    segments = [
        Segment(adapter=a.name, num_tokens=n) for a, n in zip(adapters, (4, 2), strict=True)
    ]
    h_ND = _random(6)
    clean = _gradients(adapters[1:], _run(trunk, segments, h_ND, (4, 2)), _random(6, 9))
    h_ND[:2] = float("nan")
    poisoned = _gradients(adapters[1:], _run(trunk, segments, h_ND, (4, 2)), _random(6, 9))
    assert all(torch.equal(a, b) for a, b in zip(clean, poisoned, strict=True))


@by_kinds
def test_weights_stay_float32_on_a_two_byte_base(kinds: list[str], tmp_path: Path) -> None:
    parts = load_parts(tiny_model("llama", tmp_path)[0], Cut(1, 3), dtype="bfloat16")
    adapters = [attach(part, _settings(kinds)) for part in parts]
    for row in ([*ROW] * 6, ROW):
        logits = _logits(parts, pack([row]))
        assert logits.dtype == torch.bfloat16
        logits.float().square().sum().backward()
    assert {p.dtype for a in adapters for p in a.parameters()} == {torch.float32}
    assert {p.grad.dtype for a in adapters for p in a.parameters() if p.grad is not None} == {
        torch.float32
    }


@by_kinds
def test_settings_survive_as_plain_values(kinds: list[str]) -> None:
    settings = _settings(kinds, parts=[Part.TRUNK])
    plain = settings.model_dump(mode="json")
    assert parse_settings(AdapterSettings, plain, "adapter") == settings
    assert ("kind" in plain) == (kinds == ["lora"])


def test_lora_alone_is_written_and_digested_as_in_earlier_releases() -> None:
    before = {
        "kind": "lora",
        "rank": 8,
        "alpha": 16.0,
        "dropout": 0.0,
        "targets": "all-linear",
        "parts": ["head", "trunk", "tail"],
        "train_a": True,
        "seed": 0,
    }
    settings = parse_settings(AdapterSettings, before, "an earlier release's")
    assert settings == AdapterSettings()
    assert settings.model_dump(mode="json") == before
    assert settings_digest(settings).startswith("4c3a241ef20a4c98")


def test_what_a_kind_does_not_use_makes_no_difference() -> None:
    plain, other = _settings(["sparse"]), _settings(["sparse"], prefix={"num_virtual_tokens": 9})
    assert plain == other
    assert settings_digest(plain) == settings_digest(other)
    assert _settings(["prefix", "lora"]) == _settings(["lora", "prefix"])


@pytest.mark.parametrize(
    "table",
    [
        {"kinds": []},
        {"kinds": ["lora", "lora"]},
        {"kinds": ["dora"]},
        {"kind": "dora"},
        {"kind": "lora", "kinds": ["lora"]},
        {"kinds": ["prefix"], "prefix": {"num_virtual_tokens": 0}},
        {"kinds": ["sparse"], "sparse": {"qkv_ratio": 0, "dense_ratio": 0}},
        {"kinds": ["sparse"], "sparse": {"qkv_ratio": -0.1}},
        {"kinds": ["sparse"], "sparse": {"dense_ratio": 1.01}},
        {"kinds": ["sparse"], "sparse": {"choose": "random"}},
    ],
    ids=str,
)
def test_wrong_settings_are_refused(table: dict[str, object]) -> None:
    with pytest.raises(ConfigError):
        parse_settings(AdapterSettings, table, "adapter")


def test_a_prefix_as_long_as_the_context_is_refused(tmp_path: Path) -> None:
    head = _parts(tmp_path)[0]
    settings = _settings(["prefix"], prefix={"num_virtual_tokens": 128})
    with pytest.raises(ModelError, match="leaves no room in the model's context of 128"):
        attach(head, settings)
    assert attach(head, _settings(["lora"])).parameters()


def test_rows_have_room_for_what_the_prefix_leaves(tmp_path: Path) -> None:
    parts = _parts(tmp_path)
    adapters = [attach(part, _settings(["prefix"])) for part in parts]
    assert _logits(parts, pack([[5] * 124])).shape[0] == 124
    with pytest.raises(DataError, match=r"row of 129 tokens.*a prefix counts"):
        _logits(parts, pack([[5] * 125]))
    for adapter in adapters:
        adapter.deactivate()
    assert _logits(parts, pack([[5] * 128])).shape[0] == 128


def test_a_prefix_needs_keys_and_values_of_one_width(tmp_path: Path) -> None:
    trunk = _parts(tmp_path, "minicpm3")[1]
    with pytest.raises(ModelError, match=r"keys and values of one width.*train lora or sparse"):
        attach(trunk, _settings(["prefix"]))
    assert not any(p.requires_grad for p in trunk.parameters())


def test_a_failed_kind_leaves_nothing_of_the_others(tmp_path: Path) -> None:
    trunk = _parts(tmp_path, "minicpm3")[1]
    first = attach(trunk, _settings(["lora"]), "first")
    stir(first)
    h_ND, rows = _random(5), Rows(lengths=(5,))
    before = trunk(h_ND, rows)
    with pytest.raises(ModelError, match="prefix"):
        attach(trunk, _settings(["lora", "prefix"]), "second")
    assert torch.equal(trunk(h_ND, rows), before)
    trained = {id(p) for p in trunk.parameters() if p.requires_grad}
    assert trained == {id(p) for p in first.parameters()}
