"""A run that is interrupted ends with the very bits of one that is not."""

from pathlib import Path

import pytest
import torch

from cutlayer import Client
from cutlayer.client.run_state import StepRecord
from cutlayer.client.train import Report
from cutlayer.errors import ConfigError, PermissionRefused, SpecMismatch
from cutlayer.privacy.run_privacy import SECRET_FILE
from cutlayer.storage.files import private_folder
from tests.tiny_models import tiny_llama_folder
from tests.worlds import client_of, client_settings, loopback, running_server, server_settings

NOISE = {"privacy__mechanism": "gaussian", "privacy__scale": 0.02}


class _Stop(Exception):
    """Stands for a kill between two steps."""


def _stop_after(step: int) -> object:
    def on_step(report: Report) -> None:
        if report.record.step == step:
            raise _Stop

    return on_step


def _adapters(client: Client) -> dict[str, torch.Tensor]:
    step = client._state.saved_steps()[-1]
    tensors = client._state.load(step).tensors
    return {**tensors["head"], **tensors["tail"], **client.trunk.pull_adapter(client.run_id, step)}


def _whole(model: Path, folder: Path) -> tuple[list[StepRecord], dict[str, torch.Tensor], int]:
    settings = client_settings(model, folder, train__save_every=2, **NOISE)
    with (
        running_server(server_settings(model, folder)) as server,
        client_of(server, settings) as client,
    ):
        history = client.train().history
        return history, _adapters(client), client.ledger.num_lines


@pytest.mark.parametrize("lost", ["client", "server", "both"])
def test_resumed_run_is_bit_equal_and_replays_cost_nothing(tmp_path: Path, lost: str) -> None:
    model = tiny_llama_folder(tmp_path)
    whole_folder = private_folder(tmp_path / "whole")
    history, adapters, num_lines = _whole(model, whole_folder)
    folder = private_folder(tmp_path / "broken")
    private_folder(folder / "run")
    secret = (whole_folder / "run" / SECRET_FILE).read_bytes()
    (folder / "run" / SECRET_FILE).touch(mode=0o600)
    (folder / "run" / SECRET_FILE).write_bytes(secret)
    settings = client_settings(model, folder, train__save_every=2, **NOISE)
    first = server_settings(model, folder)
    with running_server(first) as server:
        with client_of(server, settings) as client, pytest.raises(_Stop):
            client.train(_stop_after(3))  # type: ignore[arg-type]
        if lost == "client":
            with client_of(server, settings) as client:
                resumed = client.train().history
                assert _same(_adapters(client), adapters)
                assert client.ledger.num_lines == num_lines
    if lost != "client":
        with running_server(first) as server, client_of(server, settings) as client:
            resumed = client.train().history
            assert _same(_adapters(client), adapters)
            assert client.ledger.num_lines == num_lines
    assert resumed == history


def test_server_that_vanishes_within_a_step_takes_both_sides_back(tmp_path: Path) -> None:
    model = tiny_llama_folder(tmp_path)
    history, adapters, _ = _whole(model, private_folder(tmp_path / "whole"))
    folder = private_folder(tmp_path / "broken")
    private_folder(folder / "run")
    secret = (tmp_path / "whole" / "run" / SECRET_FILE).read_bytes()
    (folder / "run" / SECRET_FILE).touch(mode=0o600)
    (folder / "run" / SECRET_FILE).write_bytes(secret)
    settings = client_settings(model, folder, train__save_every=2, **NOISE)
    seen: list[int] = []
    with (
        running_server(server_settings(model, folder)) as server,
        client_of(server, settings) as client,
    ):

        def lose_memory(report: Report) -> None:
            seen.append(report.record.step)
            if seen.count(3) == 1 and seen[-1] == 3:
                for run in list(server._host._runs.values()):
                    run.close()
                server._host._runs.clear()

        assert client.train(lose_memory).history == history
        assert seen == [1, 2, 3, 3, 4, 5, 6]
        assert _same(_adapters(client), adapters)


def test_other_data_in_the_same_run_folder_is_refused(tmp_path: Path) -> None:
    model = tiny_llama_folder(tmp_path)
    with running_server(server_settings(model, tmp_path)) as server:
        with client_of(server, client_settings(model, tmp_path)) as client:
            client.train()
        changed = client_settings(model, tmp_path, adapter__rank=2)
        with client_of(server, changed) as client, pytest.raises(ConfigError, match="adapter"):
            client.train()


def test_certificate_without_the_role_is_refused_by_name(tmp_path: Path) -> None:
    model = tiny_llama_folder(tmp_path)
    settings = client_settings(model, tmp_path)
    with running_server(server_settings(model, tmp_path)) as server:
        only_generate = frozenset({"generate"})
        client = Client(settings, connect=lambda: loopback(server, only_generate))
        with client, pytest.raises(PermissionRefused, match="not train"):
            client.train()


def test_another_cut_or_model_is_refused_with_what_differs(tmp_path: Path) -> None:
    model = tiny_llama_folder(tmp_path)
    (tmp_path / "other").mkdir()
    other = tiny_llama_folder(tmp_path / "other", seed=1)
    with running_server(server_settings(model, tmp_path)) as server:
        cut = client_settings(model, tmp_path, model__lower=0)
        with client_of(server, cut) as client, pytest.raises(SpecMismatch, match="lower"):
            client.train()
        weights = client_settings(other, tmp_path, run__folder=str(tmp_path / "run2"))
        with client_of(server, weights) as client, pytest.raises(SpecMismatch, match="block"):
            client.train()


def _same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)
