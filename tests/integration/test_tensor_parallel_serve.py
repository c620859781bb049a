"""`torchrun ... cutlayer serve`: a client cannot tell it from one process, and it stops cleanly."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from cutlayer import Client
from tests.tiny_models import tiny_llama_folder
from tests.worlds import client_of, client_settings, running_server, server_settings

TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
SERVE = ("-m", "cutlayer.cli.main", "serve", "--json")
WAIT_S = 90.0


def config_in(folder: Path, model: Path) -> Path:
    path = folder / "server.toml"
    path.write_text(
        f'[model]\npath = "{model}"\nlower = 1\nupper = 3\n'
        '[listen]\naddress = "127.0.0.1:0"\nplaintext = true\n'
        f'[state]\nfolder = "{folder / "server"}"\n'
    )
    return path


@contextmanager
def torchrun(config: Path) -> "Iterator[subprocess.Popen[str]]":
    """Two processes, ended with the test."""
    with subprocess.Popen(
        [*TORCHRUN, *SERVE, "--config", str(config)], stdout=subprocess.PIPE, text=True
    ) as started:
        try:
            yield started
        finally:
            # The agent ends its workers; killed, it could not.
            started.terminate()


def losses(client: Client) -> list[float]:
    return [record.loss for record in client.train().history]


def test_training_over_two_processes_is_training_over_one(tmp_path: Path) -> None:
    model = tiny_llama_folder(tmp_path)
    folders = [tmp_path / name for name in ("whole", "shared")]
    for folder in folders:
        folder.mkdir()
    with running_server(server_settings(model, folders[0])) as server:
        settings = client_settings(model, folders[0], adapter__dropout=0.1)
        with client_of(server, settings) as client:
            expected = losses(client)
    with torchrun(config_in(folders[1], model)) as started:
        assert started.stdout is not None
        ready = json.loads(started.stdout.readline())
        settings = client_settings(
            model, folders[1], adapter__dropout=0.1, connection__address=ready["address"]
        )
        with Client(settings) as client:
            assert losses(client) == pytest.approx(expected, rel=1e-5)
        os.kill(started.pid, signal.SIGTERM)
        last, _ = started.communicate(timeout=WAIT_S)
    assert json.loads(last.splitlines()[-1])["event"] == "stopped"


def test_replicas_and_torchrun_are_refused_together(tmp_path: Path) -> None:
    config = config_in(tmp_path, tiny_llama_folder(tmp_path))
    environment = {**os.environ, "WORLD_SIZE": "2", "RANK": "0"}
    done = subprocess.run(
        [sys.executable, *SERVE, "--config", str(config), "--replicas", "2"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=WAIT_S,
    )
    assert done.returncode == 2
    assert "choose one" in done.stderr
