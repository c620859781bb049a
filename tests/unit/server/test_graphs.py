"""A graph that does not fit is recomputed: same gradients, no memory held."""

from pathlib import Path

import pytest
import torch

from cutlayer.model.adapters import AdapterSettings, attach
from cutlayer.model.partition import Trunk
from cutlayer.model.rows import Rows
from cutlayer.server.engine import Gradients, TrunkEngine
from cutlayer.server.graphs import Graph, GraphBudget
from tests.unit.server.trunk_world import random_ND, tiny_trunk

BLOCKS = range(1, 3)


def _engine(trunk: Trunk, max_bytes: int = 1 << 30) -> tuple[TrunkEngine, GraphBudget]:
    budget = GraphBudget(max_bytes)
    return TrunkEngine(trunk, budget), budget


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_recomputed_graph_gives_the_same_bits_as_a_kept_one(tmp_path: Path, family: str) -> None:
    trunk = tiny_trunk(tmp_path, family)
    kept, dropped = (_engine(trunk, max_bytes) for max_bytes in (1 << 30, 0))
    assert kept[0].can_share == (family == "llama")
    adapter = attach(trunk, AdapterSettings(dropout=0.3))
    rows, h_ND, grad_ND = Rows(lengths=(5, 3)), random_ND(8, 0), random_ND(8, 1)
    results = []
    for engine, budget in (kept, dropped):
        graph = Graph("a", adapter, h_ND, rows, BLOCKS, 11, wants_grad=True)
        (y_ND,) = engine.forward([graph])
        assert (budget.used_bytes > 0) == (budget.max_bytes > 0)
        (found,) = engine.backward([(graph, grad_ND)])
        assert budget.used_bytes == 0
        assert isinstance(found, Gradients)
        results.append([y_ND, found.input_ND, *found.weights])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert not trunk.training


def test_activations_are_freed_after_the_last_member_is_gone(tmp_path: Path) -> None:
    trunk = tiny_trunk(tmp_path)
    engine, budget = _engine(trunk)
    adapters = [attach(trunk, AdapterSettings(), name) for name in ("one", "two")]
    graphs = [
        Graph(a.name, a, random_ND(3, 0), Rows(lengths=(3,)), BLOCKS, 0, wants_grad=False)
        for a in adapters
    ]
    engine.forward(graphs)
    assert graphs[0].joint is graphs[1].joint is not None
    graphs[0].drop()
    assert budget.used_bytes > 0
    graphs[0].drop()
    graphs[1].drop()
    assert budget.used_bytes == 0


def test_repeated_forwards_leave_no_bytes_behind(tmp_path: Path) -> None:
    trunk = tiny_trunk(tmp_path)
    engine, budget = _engine(trunk)
    adapter = attach(trunk, AdapterSettings())
    for _ in range(3):
        graph = Graph(
            "a", adapter, random_ND(3, 0), Rows(lengths=(3,)), BLOCKS, 0, wants_grad=False
        )
        engine.forward([graph])
        graph.drop()
    assert budget.used_bytes == 0


def test_two_byte_trunk_takes_and_gives_float32(tmp_path: Path) -> None:
    trunk = tiny_trunk(tmp_path).to(torch.bfloat16)
    engine, _ = _engine(trunk)
    adapter = attach(trunk, AdapterSettings())
    graph = Graph("a", adapter, random_ND(3, 0), Rows(lengths=(3,)), BLOCKS, 0, wants_grad=True)
    (y_ND,) = engine.forward([graph])
    (found,) = engine.backward([(graph, random_ND(3, 1))])
    assert isinstance(y_ND, torch.Tensor)
    assert isinstance(found, Gradients)
    assert found.input_ND is not None
    assert y_ND.dtype == found.input_ND.dtype == torch.float32


@pytest.mark.parametrize(
    ("family", "changes", "can_share"),
    [
        ("llama", {}, True),
        ("llama", {"attention_dropout": 0.1}, False),
        ("gpt2", {"resid_pdrop": 0.0, "attn_pdrop": 0.0, "embd_pdrop": 0.0}, True),
        ("mixtral", {"router_jitter_noise": 0.1}, False),
        ("mixtral", {}, True),
        (
            "llama",
            {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}},
            False,
        ),
    ],
)
def test_rows_of_clients_share_no_call_of_a_model_where_they_would_meet(
    tmp_path: Path, family: str, changes: dict[str, object], can_share: bool
) -> None:
    engine, _ = _engine(tiny_trunk(tmp_path, family, **changes))
    assert engine.can_share == can_share
