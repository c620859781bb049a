"""A graph that does not fit is recomputed: same gradients, no memory held."""

from pathlib import Path

import torch

from cutlayer import Cut, load_parts
from cutlayer.model.adapters import AdapterSettings, attach
from cutlayer.model.rows import Rows
from cutlayer.server.graphs import Graph, GraphBudget
from tests.tiny_models import tiny_llama_folder


def test_recomputed_graph_gives_the_same_bits_as_a_kept_one(tmp_path: Path) -> None:
    _, trunk, _ = load_parts(tiny_llama_folder(tmp_path), Cut(1, 3))
    adapter = attach(trunk, AdapterSettings(dropout=0.3))
    rows, torch_seed = Rows(lengths=(5, 3)), 11
    generator = torch.Generator().manual_seed(0)
    h_ND, grad_ND = (torch.randn(8, trunk.hidden_size, generator=generator) for _ in range(2))
    results = []
    for budget in (GraphBudget(1 << 30), GraphBudget(0)):
        graph = Graph(trunk, h_ND, rows, torch_seed, wants_input_grad=True)
        y_ND = graph.forward(budget)
        assert (budget.used_bytes > 0) == (budget.max_bytes > 0)
        grad_in_ND = graph.backward(grad_ND, budget)
        assert budget.used_bytes == 0
        results.append((y_ND, grad_in_ND, [p.grad.clone() for p in adapter.parameters()]))
        for parameter in adapter.parameters():
            parameter.grad = None
    (y_a, in_a, grads_a), (y_b, in_b, grads_b) = results
    assert torch.equal(y_a, y_b)
    assert torch.equal(in_a, in_b)
    assert all(torch.equal(a, b) for a, b in zip(grads_a, grads_b, strict=True))
    assert not trunk.training
