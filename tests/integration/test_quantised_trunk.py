"""A server with quantised weights and its clients: who agrees is served, who did not is refused."""

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from cutlayer import ClientSettings, SamplingSettings, ServerSettings
from cutlayer.demo.processes import serving
from cutlayer.errors import ConfigError, SpecMismatch
from cutlayer.model.adapters import AdapterSettings
from cutlayer.model.checkpoint import load_part
from cutlayer.model.part_settings import TrunkWeights
from cutlayer.model.partition import Cut, Part, Trunk
from cutlayer.server.batches import TrunkCall, TrunkResult
from cutlayer.server.tensor_parallel import parallel_trunk
from cutlayer.settings import parse_settings
from cutlayer.wire.messages import Decode, OpenSession
from tests.masked_worlds import masked_table
from tests.recut_worlds import owner, wide_server
from tests.tiny_models import tiny_llama_folder, tiny_model
from tests.unit.cli.cli_world import make_world, run_command
from tests.unit.server.trunk_world import (
    backward_call,
    forward_call,
    opening,
    random_ND,
    tiny_host,
)
from tests.worlds import client_of, client_settings, running_server, server_settings

QUANTISED = ("int8", "nf4")
GREEDY = SamplingSettings(max_new_tokens=6)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama_folder(tmp_path_factory.mktemp("model"))


def _server(plain: ServerSettings, weights: str, **sections: object) -> ServerSettings:
    table = {**plain.model_dump(), **sections}
    table["model"] |= {"trunk_weights": weights}
    return parse_settings(ServerSettings, table, "test")


def _client(model: Path, folder: Path, weights: str = "full", **changes: object) -> ClientSettings:
    return client_settings(model, folder, model__trunk_weights=weights, **changes)


@pytest.mark.parametrize(
    ("at_server", "agreed"), [("nf4", "full"), ("int8", "nf4"), ("full", "int8")]
)
def test_a_client_that_did_not_agree_is_told_both_names_and_the_setting(
    at_server: str, agreed: str, model: Path, tmp_path: Path
) -> None:
    told = {"full": "'float32'", "int8": "'float32/int8'", "nf4": "'float32/nf4'"}
    with (
        running_server(_server(server_settings(model, tmp_path), at_server)) as server,
        client_of(server, _client(model, tmp_path, agreed)) as client,
    ):
        with pytest.raises(SpecMismatch, match=r"model\.trunk_weights on both sides") as refused:
            client.generate(["ab"], GREEDY)
        assert told[at_server] in str(refused.value)
        assert told[agreed] in str(refused.value)
        assert client.trunk.bytes_sent < 4096, "more than a HELLO left"


def test_a_run_is_not_continued_over_other_weights(model: Path, tmp_path: Path) -> None:
    (tmp_path / "second").mkdir()
    plain = server_settings(model, tmp_path)
    with (
        running_server(_server(plain, "int8")) as server,
        client_of(server, _client(model, tmp_path, "int8")) as client,
    ):
        client.train()
    with (
        running_server(_server(plain, "nf4")) as server,
        client_of(server, _client(model, tmp_path, "nf4", train__steps=8)) as client,
        pytest.raises(ConfigError, match="dtype"),
    ):
        client.train()


def test_masked_layers_and_several_processes_need_full_weights(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = server_settings(model, tmp_path)
    with (
        masked_table(tmp_path) as masked,
        pytest.raises(ConfigError, match=r'trunk_weights = "nf4" keeps .* remove \[masked\]'),
    ):
        _server(plain, "nf4", masked=masked)
    with pytest.raises(ConfigError, match="'full', 'int8' or 'nf4'"):
        _server(plain, "fp4")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="start the server without torchrun"):
        parallel_trunk(model, Cut(1, 3), weights=TrunkWeights.INT8)


def test_a_client_that_would_train_rows_of_the_weights_is_refused(
    model: Path, tmp_path: Path
) -> None:
    settings = _client(model, tmp_path, "nf4", adapter__kinds=["sparse"])
    with (
        running_server(_server(server_settings(model, tmp_path), "nf4")) as server,
        client_of(server, settings) as client,
        pytest.raises(ConfigError, match=r"q_proj is quantised .* train lora on it instead"),
    ):
        client.train()


@pytest.mark.parametrize("weights", QUANTISED)
def test_a_run_goes_on_when_its_cut_moves_within_a_quantised_trunk(
    weights: str, model: Path, tmp_path: Path
) -> None:
    settings = owner(model, tmp_path, model__trunk_weights=weights)
    with (
        running_server(_server(wide_server(model, tmp_path), weights)) as server,
        client_of(server, settings) as client,
    ):
        first = client.train().history
        client.recut(2, 4, share_adapter=True)
        assert client.generate(["ab"], GREEDY)
    longer = owner(model, tmp_path, model__trunk_weights=weights, train__steps=9)
    with (
        running_server(_server(wide_server(model, tmp_path), weights)) as server,
        client_of(server, longer) as client,
    ):
        history = client.train().history
    assert [record.step for record in history] == list(range(1, 10))
    assert history[-1].loss < first[0].loss


def _trunk(folder: Path, weights: str) -> Trunk:
    trunk = load_part(folder, Cut(1, 3), Part.TRUNK, weights=TrunkWeights(weights))
    assert isinstance(trunk, Trunk)
    return trunk


def _results(found: Sequence[object]) -> list[Tensor]:
    tensors = []
    for result in found:
        assert isinstance(result, TrunkResult)
        assert result.tensor is not None
        tensors.append(result.tensor)
    return tensors


@pytest.mark.parametrize("weights", QUANTISED)
def test_clients_in_joint_calls_get_what_each_gets_alone(weights: str, tmp_path: Path) -> None:
    model, _ = tiny_model("llama", tmp_path)
    found: dict[bool, list[Tensor]] = {}
    for is_joint in (True, False):
        host = tiny_host(tmp_path / str(is_joint), _trunk(model, weights))
        assert host.can_share
        lengths = {"a": [6], "b": [2, 3]}
        for name in lengths:
            host.open_run(name, opening(settings=AdapterSettings(rank=3, alpha=6.0)))
        forwards = [
            TrunkCall(owner=o, header=forward_call(n), tensor=random_ND(sum(n), 1))
            for o, n in lengths.items()
        ]
        backwards = [
            TrunkCall(owner=o, header=backward_call(), tensor=random_ND(sum(n), 2))
            for o, n in lengths.items()
        ]
        sessions = {
            o: host.open_session(o, OpenSession(max_lengths=[16], run_id=None)).session_id
            for o in lengths
        }
        decodes = [
            TrunkCall(
                owner=o,
                header=Decode(session_id=s, rows=[0], lengths=[5], positions=[0]),
                tensor=random_ND(5, ord(o)),
            )
            for o, s in sessions.items()
        ]
        found[is_joint] = []
        for calls in (forwards, backwards, decodes):
            groups = [calls] if is_joint else [[call] for call in calls]
            for group in groups:
                found[is_joint] += _results(host.run_together(group))
        # Keys and values of 2 rows, 64 tokens, 2 blocks, 2 heads of 8, as float32.
        assert host.sessions.cache_bytes == 2 * 16 * 2 * 2 * 2 * 8 * 4
    for together, alone in zip(found[True], found[False], strict=True):
        torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)


def test_server_and_client_as_processes_over_mutual_tls(
    model: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    world = make_world(model, tmp_path)
    text = world.server.read_text()
    assert 'trunk_weights = "full"' in text
    world.server.write_text(text.replace('trunk_weights = "full"', 'trunk_weights = "nf4"'))
    checked = run_command(capsys, "doctor", "-c", world.server, "--json")
    assert checked.code == 0
    assert {"name": "weights", "status": "ok", "text": "nf4: bitsandbytes is installed"} in (
        checked.result["checks"]
    )
    with serving(world.server, tmp_path) as server:
        address = f"connection.address={server.address}"
        common = ("-c", world.client, "--set", address, "--json")
        greedy = ("--set", "sampling.max_new_tokens=4")
        refused = run_command(capsys, "generate", "ab:", *common, *greedy)
        agreed = ("--set", "model.trunk_weights=nf4")
        done = run_command(capsys, "generate", "ab:", *common, *greedy, *agreed)
        trained = run_command(capsys, "train", *common, *agreed)
    assert refused.code == 3
    assert "'float32/nf4'" in json.loads(refused.out)["message"]
    assert done.code == 0
    assert len(done.result["replies"]) == 1  # type: ignore[arg-type]
    assert trained.result["step"] == 6
