"""Which weights and moments go with a block, and that nothing but exactly those is taken."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from cutlayer.errors import ModelError, ProtocolError
from cutlayer.model.adapters import AdapterSettings, attach
from cutlayer.model.checkpoint import load_part
from cutlayer.model.moved_blocks import block_of, check_moved, moments_of, of_blocks
from cutlayer.model.optimizer import AdamWSettings, PartOptimizer
from cutlayer.model.partition import Cut, Part
from tests.tiny_models import tiny_model

A, B = (f"base_model.model.model.layers.{block}.mlp.up_proj.lora_A.weight" for block in (2, 13))
LAYOUT = {A: [2, 3]}


def _sent() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    moments = {f"{A}.exp_avg": torch.ones(2, 3), f"{A}.exp_avg_sq": torch.ones(2, 3)}
    return {A: torch.zeros(2, 3)}, {**moments, f"{A}.step": torch.tensor(3.0)}


def test_keys_are_told_apart_by_their_block() -> None:
    state = {B: torch.ones(1), A: torch.zeros(1)}
    assert (block_of(A), block_of(B)) == (2, 13)
    assert list(of_blocks(state, range(13, 14))) == [B]
    assert list(moments_of({f"{A}.step": torch.ones(()), f"{B}.step": torch.ones(())}, [A])) == [
        f"{A}.step"
    ]
    with pytest.raises(ModelError, match="belongs to no block"):
        block_of("base_model.model.lm_head.lora_A.weight")


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox"])
@pytest.mark.parametrize("kind", ["lora", "prefix", "sparse"])
def test_every_key_of_every_kind_names_its_block(family: str, kind: str, tmp_path: Path) -> None:
    folder, _ = tiny_model(family, tmp_path)
    trunk = load_part(folder, Cut(1, 3), Part.TRUNK)
    adapter = attach(trunk, AdapterSettings(kinds=[kind], rank=2))  # type: ignore[list-item]
    assert {block_of(key) for key in adapter.state()} == {1, 2}
    optimizer = PartOptimizer(adapter, AdamWSettings())
    for parameter in adapter.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step(1.0, 0.1)
    moved = of_blocks(adapter.state(), {2})
    moments = moments_of(optimizer.state(), moved)
    check_moved(moved, moments, {key: list(x.shape) for key, x in moved.items()}, "client")
    assert len(moments) == 3 * len(moved)


def test_exactly_the_moved_blocks_pass() -> None:
    weights, moments = _sent()
    check_moved(weights, moments, LAYOUT, "client")
    check_moved(weights, {}, LAYOUT, "client")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w, m: w.pop(A), "other weights"),
        (lambda w, m: w.update({B: torch.ones(1)}), "other weights"),
        (lambda w, m: w.update({A: torch.ones(3, 2)}), r"\[3, 2\], expected"),
        (lambda w, m: w.update({A: torch.ones(2, 3, dtype=torch.float16)}), "float16"),
        (lambda w, m: w[A].fill_(torch.nan), "NaN"),
        (lambda w, m: m.pop(f"{A}.step"), "some moments"),
        (lambda w, m: m.update({f"{A}.step": torch.ones(1)}), r"expected is float32 \[\]"),
        (lambda w, m: m.update({f"{B}.step": torch.ones(())}), "no moved weight"),
        (lambda w, m: m.update({f"{A}.grad": torch.ones(2, 3)}), "no moved weight"),
        (lambda w, m: m[f"{A}.exp_avg"].fill_(torch.inf), "infinite"),
        (lambda w, m: m[f"{A}.exp_avg_sq"].fill_(-1.0), "AdamW never has"),
        (lambda w, m: m[f"{A}.step"].fill_(-1.0), "AdamW never has"),
        (lambda w, m: m[f"{A}.step"].fill_(1.5), "AdamW never has"),
    ],
)
def test_anything_else_is_refused(change: object, message: str) -> None:
    weights, moments = _sent()
    change(weights, moments)  # type: ignore[operator]
    with pytest.raises(ProtocolError, match=message):
        check_moved(weights, moments, LAYOUT, "client")
