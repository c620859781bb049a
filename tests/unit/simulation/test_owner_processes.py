"""Owners as processes: the first that fails ends all, and says which owner it was."""

import os
import time
from pathlib import Path

import psutil
import pytest

from cutlayer.errors import ConfigError
from cutlayer.simulation.processes import train_in_processes
from tests.tiny_models import tiny_llama_folder
from tests.unit.cli.cli_world import make_world


def _children() -> set[int]:
    return {child.pid for child in psutil.Process(os.getpid()).children(recursive=True)}


def test_the_first_failing_owner_ends_all_and_is_named(tmp_path: Path) -> None:
    before = _children()
    world = make_world(tiny_llama_folder(tmp_path), tmp_path)
    # This one waits for a server that does not listen.
    waiting = tmp_path / "waiting.toml"
    lines = world.client.read_text().splitlines(keepends=True)
    kept = [line for line in lines if not line.startswith("connection.connect_timeout_s")]
    waiting.write_text("".join(kept) + "connection.connect_timeout_s = 300.0\n")
    configs = {"clinic": waiting, "lab": tmp_path / "none.toml"}
    began_s = time.monotonic()
    with pytest.raises(ConfigError, match="owner lab: cannot read settings"):
        train_in_processes(configs, tmp_path)
    assert time.monotonic() - began_s < 250
    assert not _children() - before
    assert (tmp_path / "clinic.log").exists()
