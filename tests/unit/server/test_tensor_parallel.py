"""What a leader tells its followers, seen in a group of one process."""

import gc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
import torch.distributed as dist

from cutlayer.errors import ConfigError
from cutlayer.model.adapters import AdapterSettings, attach
from cutlayer.model.collectives import Ranks
from cutlayer.model.kv_cache import RowCache
from cutlayer.model.optimizer import AdamWSettings, PartOptimizer
from cutlayer.model.partition import Cut, Trunk
from cutlayer.model.rows import Rows
from cutlayer.server.tensor_parallel import parallel_trunk
from tests.tiny_models import tiny_llama_folder

Told = list[dict[str, Any]]
ROWS = Rows(lengths=(3, 2))


@pytest.fixture
def alone() -> Iterator[None]:
    """A process group of this process."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> Told:
    """Every command, as a follower would read it."""
    commands: Told = []
    tell = Ranks.tell

    def remember(self: Ranks, message: bytes) -> None:
        commands.append(msgspec.msgpack.decode(message))
        tell(self, message)

    monkeypatch.setattr(Ranks, "tell", remember)
    return commands


@pytest.fixture
def trunk(alone: None, told: Told, tmp_path: Path) -> Trunk:
    return parallel_trunk(tiny_llama_folder(tmp_path), Cut(1, 3), ranks=Ranks(0, 1))


def test_graph_and_cache_are_dropped_when_the_leader_has_dropped_them(
    trunk: Trunk, told: Told
) -> None:
    attach(trunk, AdapterSettings(rank=2))
    h_ND = torch.ones(5, trunk.hidden_size)
    y_ND = trunk(h_ND, ROWS)
    caches = [RowCache(2, 8) for _ in range(2)]
    with torch.inference_mode():
        trunk(h_ND, ROWS, caches)
    assert told[1]["gone_calls"] == []
    graph, cache_names = told[0]["number"], [number for number, _ in told[1]["caches"]]
    del y_ND, caches
    gc.collect()
    with torch.no_grad():
        trunk(h_ND, ROWS)
    assert graph in told[2]["gone_calls"]
    assert sorted(told[2]["gone_caches"]) == cache_names


def test_weights_travel_once_until_they_change(trunk: Trunk, told: Told) -> None:
    h_ND = torch.ones(5, trunk.hidden_size)
    adapter = attach(trunk, AdapterSettings(rank=2))
    optimizer = PartOptimizer(adapter, AdamWSettings())
    for _ in range(2):
        trunk(h_ND, ROWS)
    for parameter in adapter.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step(scale=1.0, lr=0.1)
    trunk(h_ND, ROWS)
    adapter.remove()
    attach(trunk, AdapterSettings(rank=3))
    trunk(h_ND, ROWS)
    changes = [command["adapters"] for command in told]
    assert [len(change["added"]) for change in changes] == [1, 0, 0, 1]
    assert [len(change["loaded"]) for change in changes] == [1, 0, 1, 1]
    assert [change["dropped"] for change in changes] == [[], [], [], ["default"]]
    assert changes[3]["added"][0]["settings"]["rank"] == 3


def test_backward_is_told_before_it_is_computed(trunk: Trunk, told: Told) -> None:
    attach(trunk, AdapterSettings(rank=2))
    trunk(torch.ones(5, trunk.hidden_size), ROWS).sum().backward()
    assert [command["type"] for command in told] == ["call", "backward"]
    assert told[0]["number"] == told[1]["number"]


def test_refused_call_is_never_told(trunk: Trunk, told: Told) -> None:
    with pytest.raises(ConfigError, match="caches"):
        trunk(torch.ones(5, trunk.hidden_size), ROWS, [RowCache(2, 8)])
    caches = [RowCache(2, 8) for _ in range(2)]
    ahead = Rows(lengths=(3, 2), starts=(1, 0))
    with pytest.raises(ConfigError, match="caches hold"):
        trunk(torch.ones(5, trunk.hidden_size), ahead, caches)
    assert told == []
