"""Processes of the demo: their errors become ours, and none stays behind."""

import os
from pathlib import Path

import psutil
import pytest

from cutlayer.demo.processes import serving, train_in_process
from cutlayer.errors import ConfigError, TransportError
from tests.tiny_models import tiny_llama_folder
from tests.unit.cli.cli_world import make_world


def _all_children() -> set[int]:
    return {child.pid for child in psutil.Process(os.getpid()).children(recursive=True)}


_BEFORE: set[int] = set()


@pytest.fixture(autouse=True)
def _note_children() -> None:
    """Other tests of the session may have left helpers, such as multiprocessing's tracker."""
    _BEFORE.clear()
    _BEFORE.update(_all_children())


def _children() -> set[int]:
    return _all_children() - _BEFORE


def test_server_that_cannot_start_gives_its_own_error(tmp_path: Path) -> None:
    config = tmp_path / "server.toml"
    config.write_text("[model]\n")
    with pytest.raises(ConfigError, match=r"model\.path is required"), serving(config, tmp_path):
        pass
    assert not _children()


def test_server_that_is_not_ready_in_time_is_stopped(tmp_path: Path) -> None:
    world = make_world(tiny_llama_folder(tmp_path), tmp_path)
    with (
        pytest.raises(TransportError, match="not ready in time"),
        serving(world.server, tmp_path, start_s=0.0),
    ):
        pass
    assert not _children()


def test_training_that_fails_gives_its_own_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot read settings"):
        train_in_process(tmp_path / "none.toml")
    assert not _children()


def test_server_does_not_outlive_a_failing_block(tmp_path: Path) -> None:
    world = make_world(tiny_llama_folder(tmp_path), tmp_path)
    pids = []

    def fail() -> None:
        with serving(world.server, tmp_path) as server:
            pids.append(server.pid)
            assert psutil.pid_exists(server.pid)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert not psutil.pid_exists(pids[0])
