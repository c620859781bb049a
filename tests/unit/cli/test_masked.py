"""`cutlayer masked worker`, as a process, and the example settings of a masked part."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from cutlayer.client.settings import ClientSettings
from cutlayer.errors import ConfigError
from cutlayer.server.settings import ServerSettings
from cutlayer.settings import Settings, load_settings, parse_settings
from cutlayer.tee.masked.linear import MaskedPlace
from cutlayer.tee.masked.remote import RemoteAccelerator, RemoteDealing, WorkerLink
from cutlayer.tee.masked.settings import MaskedWorkerSettings
from cutlayer.tee.masked.sources import Dealer
from tests.masked_worlds import masked

EXAMPLES = Path(__file__).parents[3] / "examples"


def _start(folder: Path, role: str) -> "subprocess.Popen[str]":
    settings = [f'role = "{role}"', f'listen = "unix:{folder / role}.sock"', "threads = 1"]
    if role == "dealer":
        settings.append(f'key_file = "{folder / "dealer.key"}"')
    path = folder / f"{role}.toml"
    path.write_text("\n".join(settings))
    return subprocess.Popen(
        [sys.executable, "-m", "cutlayer.cli.main", "masked", "worker", "--json", "-c", str(path)],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def _ready(process: "subprocess.Popen[str]") -> dict[str, str]:
    assert process.stdout is not None
    lines = iter(process.stdout.readline, "")
    found: dict[str, str] = json.loads(next(line for line in lines if line.startswith("{")))
    return found


def test_two_worker_processes_serve_a_masked_layer(tmp_path: Path) -> None:
    processes = [_start(tmp_path, role) for role in ("accelerator", "dealer")]
    ready = [_ready(process) for process in processes]
    accelerator = WorkerLink(ready[0]["address"], "accelerator", 30.0)
    dealer = WorkerLink(ready[1]["address"], "dealer", 30.0, ready[1]["dealer_key"])
    place = MaskedPlace(RemoteAccelerator(accelerator), Dealer(RemoteDealing(dealer)))
    torch.manual_seed(0)
    layer = nn.Linear(40, 30)
    x = torch.randn(6, 40)
    assert torch.allclose(masked(layer, place)(x), layer(x), atol=1e-3)
    place.close()
    for process in processes:
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=30) == 0
        assert process.stdout is not None
        process.stdout.close()


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("masked-accelerator.toml", MaskedWorkerSettings),
        ("masked-dealer.toml", MaskedWorkerSettings),
        ("masked-server.toml", ServerSettings),
        ("masked-client.toml", ClientSettings),
    ],
)
def test_the_examples_of_a_masked_part_load(name: str, kind: type[Settings]) -> None:
    load_settings(kind, EXAMPLES / name)


@pytest.mark.parametrize(
    "table",
    [
        {"role": "dealer", "listen": "h:1"},
        {"role": "accelerator", "listen": "h:1", "key_file": "k"},
        {"role": "both", "listen": "h:1"},
        {"role": "accelerator", "listen": "nowhere"},
    ],
)
def test_worker_settings_that_make_no_sense_are_refused(table: dict[str, object]) -> None:
    with pytest.raises(ConfigError):
        parse_settings(MaskedWorkerSettings, table, "test")
