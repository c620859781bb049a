"""`cutlayer enclave` from end to end: a confined process serves, its owner's commands use it."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from cutlayer.demo.settings_text import settings_text
from tests.enclave_worlds import enclave_settings, owner_settings
from tests.tiny_models import tiny_llama_folder
from tests.unit.cli.cli_world import run_command


@dataclass(frozen=True)
class _Served:
    folder: Path
    owner: Path
    told: dict[str, object]


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[_Served]:
    folder = tmp_path_factory.mktemp("enclave")
    model = tiny_llama_folder(folder)
    process = {"uid": None, "lock_memory": False}
    settings = folder / "enclave.toml"
    settings.write_text(settings_text(enclave_settings(model, folder, process=process)))
    command = [sys.executable, "-m", "cutlayer.cli.main", "enclave", "serve"]
    serving = subprocess.Popen(
        [*command, "--config", str(settings), "--json"],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert serving.stdout is not None
    try:
        told = json.loads(serving.stdout.readline())
        owner = folder / "owner.toml"
        changes = {
            "connection__address": told["address"].rpartition(":")[0] + f":{told['port']}",
            "sampling__max_new_tokens": 4,
            "train__steps": 4,
        }
        owner.write_text(settings_text(owner_settings(model, folder / "owner", **changes)))
        yield _Served(folder, owner, told)
    finally:
        serving.send_signal(signal.SIGTERM)
        rest = serving.communicate(timeout=60)[0]
    assert serving.returncode == 0
    assert json.loads(rest.splitlines()[-1])["event"] == "stopped"


def test_an_owner_trains_generates_and_exports(
    served: _Served, capsys: pytest.CaptureFixture[str]
) -> None:
    assert served.told["event"] == "ready"
    assert served.told["process"]["confinement"] == "SIMULATED"  # type: ignore[index]
    config = ("--config", str(served.owner), "--json")
    trained = run_command(capsys, "enclave", "train", *config)
    assert trained.code == 0, trained.err
    assert "WITHOUT NOISE" in " ".join(trained.err.split())
    assert trained.result["step"] == 4
    assert trained.result["rows_sent"] == 24
    assert trained.result["attestation"] == "attestation: NONE"
    said = run_command(capsys, "enclave", "generate", "ab:", *config)
    assert said.code == 0, said.err
    assert len(said.result["replies"]) == 1  # type: ignore[arg-type]
    out = served.folder / "out"
    exported = run_command(capsys, "enclave", "export", "--output", str(out), *config)
    assert exported.result["step"] == 4
    assert (out / "adapter_model.safetensors").exists()


def test_a_missing_policy_is_named(served: _Served, capsys: pytest.CaptureFixture[str]) -> None:
    ran = run_command(
        capsys, "enclave", "train", "--config", str(served.owner), "--set", "tee.required=true"
    )
    assert ran.code == 2
    assert "tee.policy is missing" in ran.err


def test_shared_labels_are_told_with_every_result(
    served: _Served, capsys: pytest.CaptureFixture[str]
) -> None:
    assert served.told["takes_labels"] is True
    folder = f"run.folder={served.folder / 'shared'}"
    config = ("--config", str(served.owner), "--set", 'labels="server"', "--set", folder)
    trained = run_command(capsys, "enclave", "train", *config, "--json")
    assert trained.code == 0, trained.err
    assert "labels, losses and the distribution of the text are visible" in " ".join(
        trained.err.split()
    )
    assert trained.result["labels"] == "server"
    assert "labels SHARED" in str(trained.result["attestation"])
    told = run_command(capsys, "placement", *config)
    assert "client-server: each of 4 blocks has one place" in told.out
    assert "sees LABELS, losses" in told.out
