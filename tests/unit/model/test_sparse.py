"""SPF: which heads and rows are chosen, and that they learn as in a dense run with a mask."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from cutlayer.errors import ModelError
from cutlayer.model.adapter_settings import SparseSettings
from cutlayer.model.adapters import Adapter, AdapterSettings, attach, layout_of
from cutlayer.model.attention_heads import find_heads
from cutlayer.model.checkpoint import load_part, load_parts
from cutlayer.model.folder import resolve_model
from cutlayer.model.optimizer import AdamWSettings, PartOptimizer
from cutlayer.model.partition import Cut, Part, PartModule
from cutlayer.model.rows import Rows, pack
from cutlayer.model.sparse_choice import choose_rows, digest_of
from tests.tiny_models import tiny_model
from tests.unit.model.stand_in import views

SHORT = [5, 6, 7, 8, 9, 200, 3]
LONG = SHORT * 15
"""Its rows are copied into the weight, those of `SHORT` are added to the output."""
HEADS_OF = {
    # Family: layers of a head -> where group g of width 8 begins in each, and how many rows.
    "llama": {"q_proj": [(16, 0, 16)], "k_proj": [(8, 0, 8)], "v_proj": [(8, 0, 8)]},
    "gpt2": {"c_attn": [(8, 0, 8), (8, 32, 8), (8, 64, 8)]},
    "gpt_neox": {"query_key_value": [(24, 0, 24)]},
    "phi3": {"qkv_proj": [(16, 0, 16), (8, 32, 8), (8, 48, 8)]},
}
"""(stride between groups, first row of group 0, rows)."""


def _settings(**sparse: object) -> AdapterSettings:
    return AdapterSettings(kinds=["sparse"], sparse=SparseSettings.model_validate(sparse))


def _weight(layer: nn.Module, name: str) -> Tensor:
    """[outputs, inputs]."""
    weight = layer.get_submodule(name).weight
    assert isinstance(weight, Tensor)
    return (
        weight.detach().T
        if type(layer.get_submodule(name)).__name__ == "Conv1D"
        else weight.detach()
    )


def _expected_rows(
    model: PreTrainedModel, family: str, block: str, ratio: float, largest: bool
) -> dict[str, list[int]]:
    """By brute force, from the layout above alone."""
    names = [n for n, m in model.named_modules() if n.startswith(f"{block}.")]
    linear = {n for n in names if type(model.get_submodule(n)).__name__ in ("Linear", "Conv1D")}
    with_heads = {n: HEADS_OF[family][n.split(".")[-1]] for n in linear if _ends(n, family)}
    num_groups = 2 if family in ("llama", "phi3") else 4

    def rows(name: str, group: int) -> list[int]:
        spans = with_heads[name]
        return [
            r
            for step, first, n in spans
            for r in range(first + group * step, first + group * step + n)
        ]

    scores = [
        sum(float(_weight(model, n)[rows(n, g)].abs().double().sum()) for n in with_heads)
        for g in range(num_groups)
    ]
    best = _best(scores, ratio, largest)
    found = {n: sorted(r for g in best for r in rows(n, g)) for n in with_heads}
    for name in linear - with_heads.keys():
        norms = _weight(model, name).abs().double().sum(dim=1).tolist()
        found[name] = sorted(_best(norms, ratio, largest))
    return found


def _ends(name: str, family: str) -> bool:
    return name.split(".")[-1] in HEADS_OF[family]


def _best(scores: Sequence[float], ratio: float, largest: bool) -> list[int]:
    count = max(1, int(ratio * len(scores) + 0.5))
    return sorted(range(len(scores)), key=lambda i: -scores[i] if largest else scores[i])[:count]


@pytest.mark.parametrize("family", HEADS_OF)
@pytest.mark.parametrize(
    ("ratio", "choose"), [(0.25, "largest"), (0.625, "smallest"), (1, "largest")]
)
def test_heads_and_rows_are_those_of_the_extreme_norms(
    family: str, ratio: float, choose: str, tmp_path: Path
) -> None:
    folder, model = tiny_model(family, tmp_path)
    trunk = load_part(resolve_model(folder), Cut(2, 3), Part.TRUNK, "float32", "cpu")
    shapes = layout_of(trunk, _settings(qkv_ratio=ratio, dense_ratio=ratio, choose=choose))
    blocks = f"{trunk.layout.prefix}.{trunk.layout.blocks}.2"
    expected = _expected_rows(model, family, blocks, ratio, choose == "largest")
    assert shapes == {
        f"base_model.model.{name}.sparse_{digest_of(torch.tensor(rows))}.delta": [
            len(rows),
            _weight(model, name).shape[1],
        ]
        for name, rows in sorted(expected.items())
    }


def test_a_ratio_of_none_leaves_those_layers_frozen(tmp_path: Path) -> None:
    parts = load_parts(tiny_model("llama", tmp_path)[0], Cut(1, 3))
    for kept, settings in (
        ("self_attn.[qkv]_proj", _settings(dense_ratio=0)),
        ("(o_proj|mlp)", _settings(qkv_ratio=0)),
    ):
        keys = list(layout_of(parts[1], settings))
        assert keys
        assert all(re.search(kept, key) for key in keys)


def test_of_equal_norms_the_lower_row_is_chosen() -> None:
    settings = SparseSettings(dense_ratio=0.5)
    for choose in ("largest", "smallest"):
        found = choose_rows(
            ["up"],
            None,
            lambda _: torch.ones(6, dtype=torch.float64),
            settings.model_copy(update={"choose": choose}),
        )
        assert found["up"].tolist() == [0, 1, 2]


def _dense(folder: Path, chosen: Mapping[str, list[int]]) -> PreTrainedModel:
    """The whole model, every linear layer of it trained, gradients masked to the chosen rows."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.requires_grad_(False)
    for name, rows in chosen.items():
        layer = model.get_submodule(name)
        mask = torch.zeros_like(_weight(model, name))
        mask[rows] = 1
        mask = mask.T if type(layer).__name__ == "Conv1D" else mask
        layer.weight.requires_grad_(True).register_hook(lambda grad, mask=mask: grad * mask)
    return model


def _loss(logits: Tensor, row: list[int]) -> Tensor:
    return nn.functional.cross_entropy(logits[:-1], torch.tensor(row[1:]), reduction="sum")


@pytest.mark.parametrize("row", [SHORT, LONG], ids=["few", "many"])
@pytest.mark.parametrize("family", HEADS_OF)
def test_training_equals_a_dense_run_whose_gradients_are_masked(
    family: str, row: list[int], tmp_path: Path
) -> None:
    folder, model = tiny_model(family, tmp_path)
    parts = load_parts(folder, Cut(1, 3))
    adapters = [attach(part, _settings(qkv_ratio=0.5, dense_ratio=0.5)) for part in parts]
    chosen: dict[str, list[int]] = {}
    for index in range(4):
        block = f"{parts[0].layout.prefix}.{parts[0].layout.blocks}.{index}"
        chosen |= _expected_rows(model, family, block, 0.5, True)
    dense = _dense(folder, chosen)
    adamw = torch.optim.AdamW(
        [p for p in dense.parameters() if p.requires_grad], lr=1e-3, weight_decay=0
    )
    optimizers = [PartOptimizer(adapter, AdamWSettings()) for adapter in adapters]
    for _ in range(4):
        expected = _loss(dense(torch.tensor([row])).logits[0], row)
        expected.backward()
        loss = _split_loss(parts, row)
        loss.backward()
        assert loss.item() == pytest.approx(expected.item(), rel=2e-6)
        norm = sum(
            float(p.grad.double().square().sum()) for p in dense.parameters() if p.grad is not None
        )
        assert sum(o.sq_norm() for o in optimizers) == pytest.approx(norm, rel=2e-5)
        adamw.step()
        adamw.zero_grad()
        for optimizer in optimizers:
            optimizer.step(1.0, 1e-3)
    moved = sum(
        float((p - q).abs().max() > 0)
        for p, q in zip(dense.parameters(), model.parameters(), strict=True)
    )
    assert moved == len(chosen)


def _split_loss(parts: Sequence[PartModule], row: list[int]) -> Tensor:
    head, trunk, tail = parts
    rows = pack([row])
    return _loss(tail(trunk(head(rows), rows), rows), row)


def _values(adapters: Sequence[Adapter]) -> int:
    return sum(p.numel() for adapter in adapters for p in adapter.parameters())


def test_gradients_and_moments_exist_for_chosen_rows_alone(tmp_path: Path) -> None:
    folder = tiny_model("llama", tmp_path)[0]
    parts = load_parts(folder, Cut(1, 3))
    adapters = [attach(part, _settings(qkv_ratio=0.5, dense_ratio=0.25)) for part in parts]
    num_heads_values, num_dense_values = 4 * 64 * 32, 4 * (32 * 32 + 2 * 48 * 32 + 32 * 48)
    assert _values(adapters) == num_heads_values // 2 + num_dense_values // 4
    _split_loss(parts, LONG).backward()
    with_gradient = [p for part in parts for p in part.parameters() if p.grad is not None]
    assert sum(p.grad.numel() for p in with_gradient if p.grad is not None) == _values(adapters)
    optimizers = [PartOptimizer(adapter, AdamWSettings()) for adapter in adapters]
    for optimizer in optimizers:
        optimizer.step(1.0, 1e-3)
    moments = [v for o in optimizers for k, v in o.state().items() if not k.endswith(".step")]
    assert sum(value.numel() for value in moments) == 2 * _values(adapters)


@pytest.mark.parametrize("num_tokens", [20, 400])
def test_backward_never_makes_the_gradient_of_a_whole_weight(
    num_tokens: int, tmp_path: Path
) -> None:
    """A dense weight gradient of the widest layer would be the largest tensor of the backward."""
    folder = tiny_model("llama", tmp_path, intermediate_size=4096, max_position_embeddings=512)[0]
    trunk = load_parts(folder, Cut(1, 2))[1]
    attach(trunk, _settings(qkv_ratio=0, dense_ratio=0.125))
    h_ND = torch.randn(num_tokens, 32).requires_grad_()
    y_ND = trunk(h_ND, Rows(lengths=(num_tokens,)))
    with torch.profiler.profile(record_shapes=True) as profile:
        y_ND.sum().backward()
    products = [e.input_shapes for e in profile.events() if e.name == "aten::mm"]
    outputs = {(a[0], b[1]) for a, b in (shapes[:2] for shapes in products)}
    assert (512, 32) in outputs
    assert not outputs & {(4096, 32), (32, 4096)}


def test_public_weights_are_never_changed(tmp_path: Path) -> None:
    folder = tiny_model("llama", tmp_path)[0]
    parts = load_parts(folder, Cut(1, 3))
    before = {n: p.clone() for part in parts for n, p in part.named_parameters()}
    adapters = [attach(part, _settings()) for part in parts]
    _split_loss(parts, LONG).backward()
    for adapter in adapters:
        PartOptimizer(adapter, AdamWSettings()).step(1.0, 0.1)
    _split_loss(parts, LONG)
    after = {n: p for part in parts for n, p in part.named_parameters()}
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_layers_without_usual_heads_are_refused_and_count_as_dense_if_told(tmp_path: Path) -> None:
    trunk = load_parts(tiny_model("minicpm3", tmp_path)[0], Cut(1, 3))[1]
    with pytest.raises(ModelError, match=r"minicpm3 keeps its attention heads.*qkv_ratio = 0"):
        attach(trunk, _settings())
    keys = attach(trunk, _settings(qkv_ratio=0)).trained_keys()
    assert any("kv_b_proj" in key for key in keys)


def test_quantised_and_shared_out_layers_are_refused(tmp_path: Path) -> None:
    model = tiny_model("llama", tmp_path)[1]
    trunk = views(model, 1, 3)[1]
    layer = trunk.base.layers[0].mlp.up_proj
    whole = layer.weight
    layer.weight = nn.Parameter(torch.zeros(48, 32, dtype=torch.int8), requires_grad=False)
    with pytest.raises(ModelError, match="up_proj is quantised"):
        attach(trunk, _settings())
    layer.weight = nn.Parameter(torch.zeros(24, 32))
    with pytest.raises(ModelError, match="up_proj is shared out among processes"):
        attach(trunk, _settings())
    layer.weight = whole
    assert attach(trunk, _settings()).parameters()


def test_a_state_of_other_rows_does_not_fit(tmp_path: Path) -> None:
    trunk = load_parts(tiny_model("llama", tmp_path)[0], Cut(1, 3))[1]
    largest = attach(trunk, _settings(), "largest")
    smallest = attach(trunk, _settings(choose="smallest"), "smallest")
    with pytest.raises(ModelError, match="adapter state does not fit"):
        largest.load(smallest.state())


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox", "phi3", "qwen3", "gemma2"])
def test_every_row_of_an_attention_layer_belongs_to_one_head(family: str, tmp_path: Path) -> None:
    model = tiny_model(family, tmp_path)[1]
    trunk = views(model, 1, 2)[1]
    (block,) = trunk.base.get_submodule(trunk.layout.blocks).children()
    heads = find_heads(block, model.config)
    assert heads is not None
    for name in heads.layers:
        rows = [row for group in heads.groups for span in group[name] for row in span]
        assert sorted(rows) == list(range(len(_weight(block, name))))
