"""A run whose tail denoises: it trains, resumes, generates with it, and is not exported."""

from pathlib import Path

import pytest
import torch

from cutlayer import Client, TrunkServer
from cutlayer.errors import ModelError
from tests.tiny_models import tiny_llama_folder
from tests.worlds import client_of, client_settings, running_server, server_settings

NOISE: dict[str, object] = {
    "privacy__mechanism": "metric_dp",
    "privacy__scale": 4.0,
    "privacy__clip": 100.0,
}


def _client(server: TrunkServer, model: Path, folder: Path, **changes: object) -> Client:
    return client_of(server, client_settings(model, folder, **{**NOISE, **changes}))


def _losses(folder: Path, **changes: object) -> list[float]:
    folder.mkdir()
    model = tiny_llama_folder(folder)
    with (
        running_server(server_settings(model, folder)) as server,
        _client(server, model, folder, train__steps=30, **changes) as client,
    ):
        return [record.loss for record in client.train().history]


def test_it_starts_as_without_and_learns_more_under_the_same_noise(tmp_path: Path) -> None:
    frozen = {"adapter__parts": ["trunk", "tail"], "run__folder": str(tmp_path / "run")}
    without = _losses(tmp_path / "without", **frozen)
    frozen["run__folder"] = str(tmp_path / "other")
    denoised = _losses(tmp_path / "denoised", privacy__denoiser=True, **frozen)
    # Noise is of the run's secret, so that the first losses are alike, not equal.
    assert denoised[0] == pytest.approx(without[0], rel=0.1)
    assert sum(denoised[-6:]) < 0.9 * sum(without[-6:])


def test_a_reopened_run_computes_with_its_denoiser(tmp_path: Path) -> None:
    model = tiny_llama_folder(tmp_path)
    with running_server(server_settings(model, tmp_path)) as server:
        with _client(server, model, tmp_path, privacy__denoiser=True) as client:
            client.train()
            prompt = client.tokenizer.encode("abab:")
            before = client.score([prompt])
        with _client(server, model, tmp_path, privacy__denoiser=True) as client:
            after = client.score([prompt])
            # Of the same run and row: its noise is replayed, and so are the logits.
            assert torch.allclose(after, before, atol=1e-4)
            del vars(client.tail)["cutlayer_denoiser"]
            assert not torch.allclose(client.score([prompt]), before, atol=1e-2)


def test_an_interrupted_run_goes_on_as_one_that_was_not(tmp_path: Path) -> None:
    model, states = tiny_llama_folder(tmp_path), []
    for name, steps in (("whole", [6]), ("parted", [3, 6])):
        (tmp_path / name).mkdir()
        with running_server(server_settings(model, tmp_path / name)) as server:
            for number in steps:
                changes = {"train__steps": number, "train__schedule": "constant"}
                with _client(
                    server,
                    model,
                    tmp_path / name,
                    privacy__denoiser=True,
                    privacy__mechanism="none",
                    privacy__scale=None,
                    privacy__clip=None,
                    **changes,
                ) as client:
                    client.train()
                    states.append(client._parts.state())
    whole, parted = states[0], states[-1]
    assert any(key.startswith("denoiser.") for key in whole["tail"])
    for name, tensors in whole.items():
        for key, value in tensors.items():
            assert parted[name][key].allclose(value, atol=1e-5), (name, key)


def test_a_denoising_run_is_not_exported(tmp_path: Path) -> None:
    model = tiny_llama_folder(tmp_path)
    with (
        running_server(server_settings(model, tmp_path)) as server,
        _client(server, model, tmp_path, privacy__denoiser=True) as client,
    ):
        client.train()
        with pytest.raises(ModelError, match=r"privacy.denoiser = false to export"):
            client.export(tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()
