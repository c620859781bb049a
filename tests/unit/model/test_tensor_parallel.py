"""What can be shared out among how many, and what is refused; the numbers are in tests/parity."""

from pathlib import Path

import pytest
import torch

from cutlayer.errors import ConfigError, ModelError
from cutlayer.model.adapters import AdapterSettings, attach, layout
from cutlayer.model.checkpoint import load_part
from cutlayer.model.collectives import Ranks, join_ranks, own_device
from cutlayer.model.families import meta_model, read_layout
from cutlayer.model.folder import resolve_model
from cutlayer.model.partition import Cut, Part, Trunk
from cutlayer.model.tensor_parallel import ParallelTrunk
from cutlayer.server.tensor_parallel import (
    is_follower,
    parallel_trunk,
    stop_followers,
    when_lost,
)
from tests.tiny_models import tiny_llama_folder, tiny_model

CUT = Cut(1, 3)


def share_of(folder: Path, size: int, rank: int = 0) -> ParallelTrunk:
    """One share on the meta device; nobody is there to talk to."""
    model = meta_model(resolve_model(folder).config)
    return ParallelTrunk(model, read_layout(model), range(CUT.lower, CUT.upper), Ranks(rank, size))


@pytest.mark.parametrize(
    ("family", "reason"),
    [
        ("gpt2", "has no plan for tensor parallelism"),
        ("mixtral", "as 'moe_tp_experts'"),
        ("deepseek_v3", "known for linear layers: colwise"),
    ],
)
def test_family_that_cannot_be_shared_out_is_refused(
    family: str, reason: str, tmp_path: Path
) -> None:
    folder, _ = tiny_model(family, tmp_path)
    with pytest.raises(ModelError, match=reason) as refused:
        share_of(folder, 2)
    assert family in str(refused.value)


def test_heads_that_do_not_divide_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="num_key_value_heads=2 cannot be shared out among 4"):
        share_of(tiny_llama_folder(tmp_path), 4)


def test_columns_that_do_not_divide_are_refused(tmp_path: Path) -> None:
    folder, _ = tiny_model("llama", tmp_path, intermediate_size=51)
    with pytest.raises(ModelError, match="the 51 features of"):
        share_of(folder, 2)


def test_shares_together_are_the_whole(tmp_path: Path) -> None:
    folder = tiny_llama_folder(tmp_path)
    whole = load_part(folder, CUT, Part.TRUNK)
    shapes = {whole.global_name(name): p.shape for name, p in whole.named_parameters()}
    shares = [share_of(folder, 2, rank) for rank in (0, 1)]
    for share in shares:
        own = {share.global_name(name): p.shape for name, p in share.named_parameters()}
        assert own.keys() == shapes.keys()
        for name, dim in share.split_dims.items():
            if name in shapes:
                assert own[name][dim] * 2 == shapes[name][dim]
        assert any(name.endswith("o_proj.weight") for name in share.split_dims)
    whole_NO = torch.arange(8.0).reshape(2, 4)
    assert torch.equal(torch.cat([s.ranks.own(whole_NO, -1) for s in shares], -1), whole_NO)


def test_adapter_of_a_share_is_that_of_the_whole(tmp_path: Path) -> None:
    folder = tiny_llama_folder(tmp_path)
    settings = AdapterSettings(rank=2, targets=["q_proj", "down_proj"])
    whole = attach(load_part(folder, CUT, Part.TRUNK), settings)
    share = share_of(folder, 2, rank=1).to_empty(device="cpu")
    adapter = attach(share, settings)
    assert layout(adapter) == layout(whole)
    assert all(torch.equal(adapter.state()[key], value) for key, value in whole.state().items())
    adapter.load(whole.state())


def test_rows_of_a_layer_that_is_shared_out_cannot_learn(tmp_path: Path) -> None:
    share = share_of(tiny_llama_folder(tmp_path), 2, rank=1).to_empty(device="cpu")
    with pytest.raises(ModelError, match=r"shared out among processes.*one process"):
        attach(share, AdapterSettings(kinds=["sparse"]))
    assert attach(share, AdapterSettings(kinds=["prefix"])).parameters()


def test_alone_a_trunk_is_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    trunk = parallel_trunk(tiny_llama_folder(tmp_path), CUT)
    assert isinstance(trunk, Trunk)
    assert not isinstance(trunk, ParallelTrunk)
    assert not is_follower()
    when_lost(trunk, print)
    stop_followers(trunk)


def test_process_finds_its_own_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert own_device("cuda") == torch.device("cuda:3")
    assert own_device("cuda:1") == torch.device("cuda:1")
    assert own_device("cpu") == torch.device("cpu")


def test_environment_without_torchrun_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ConfigError, match="torchrun"):
        join_ranks(torch.device("cpu"), timeout_s=1.0)
