"""The adapters of a trunk's other ranks, as the leader's changes make them."""

from pathlib import Path

import torch

from cutlayer.model.adapter_mirror import AdapterChange, AdapterCopies, NewAdapter
from cutlayer.model.adapter_slots import Segment
from cutlayer.model.adapters import AdapterSettings
from cutlayer.model.checkpoint import load_part
from cutlayer.model.lora_targets import find_targets
from cutlayer.model.partition import Cut, Part, Trunk
from cutlayer.model.rows import Rows
from tests.tiny_models import tiny_llama_folder

RANK = 2


def _change(trunk: Trunk, added: str, loaded: str) -> AdapterChange:
    new = AdapterSettings(rank=RANK, alpha=4.0).model_dump(mode="json")
    sizes = sum(RANK * sum(layer.weight.shape) for layer in _linears(trunk))
    return AdapterChange(
        dropped=[],
        added=[NewAdapter(name=name, settings=new) for name in added],
        loaded=[(name, sizes) for name in loaded],
        active=None,
        segments=[Segment(adapter="a", num_tokens=3), Segment(adapter="b", num_tokens=2)],
    )


def _linears(trunk: Trunk) -> list[torch.nn.Linear]:
    names = find_targets(trunk, AdapterSettings().targets, trunk.block_range).values()
    layers = [trunk.base.get_submodule(name) for name in names]
    return [getattr(layer, "base_layer", layer) for layer in layers]


def test_new_weights_of_one_adapter_spare_the_open_graph_of_another(tmp_path: Path) -> None:
    trunk = load_part(tiny_llama_folder(tmp_path), Cut(1, 3), Part.TRUNK, "float32", "cpu")
    assert isinstance(trunk, Trunk)
    copies = AdapterCopies(trunk)
    change = _change(trunk, added="ab", loaded="ab")
    size = change.loaded[0][1]
    copies.apply(change, [torch.full((size,), 0.1), torch.full((size,), 0.2)])
    h_ND = torch.randn(5, trunk.hidden_size).requires_grad_()
    grad_ND = torch.cat([torch.zeros(3, trunk.hidden_size), torch.ones(2, trunk.hidden_size)])
    with copies.using(change):
        y_ND = trunk(h_ND, Rows(lengths=(3, 2)))
    (before,) = torch.autograd.grad(y_ND, h_ND, grad_ND, retain_graph=True)
    # The client of `a` opened its run again: its rows count as zero, the other's go on.
    copies.apply(_change(trunk, added="", loaded="a"), [torch.full((size,), 0.3)])
    (after,) = torch.autograd.grad(y_ND, h_ND, grad_ND)
    assert torch.equal(before, after)
