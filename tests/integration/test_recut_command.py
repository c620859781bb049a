"""`cutlayer recut`, alone and through a process that trains; then the old settings go on."""

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from cutlayer.client.recut_desk import is_attended
from cutlayer.demo.processes import serving
from cutlayer.storage.files import private_folder
from tests.tiny_models import tiny_llama_folder
from tests.unit.cli.cli_world import CliWorld, Ran, make_world, run_command


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[CliWorld, str]]:
    folder = private_folder(tmp_path_factory.mktemp("world") / "all")
    world = make_world(tiny_llama_folder(folder), folder)
    wide = (
        world.server.read_text().replace("lower = 1", "lower = 0").replace("upper = 3", "upper = 4")
    )
    world.server.write_text(wide)
    with serving(world.server, folder) as server:
        yield world, server.address


class _Owner:
    """Runs commands on one settings file, which never changes."""

    def __init__(
        self,
        capsys: pytest.CaptureFixture[str],
        served: tuple[CliWorld, str],
        folder: Path,
    ) -> None:
        world, address = served
        self._capsys = capsys
        self._file = str(world.client)
        self.folder = folder
        changes = (f"connection.address={address}", f"run.folder={folder / 'run'}")
        self._options = [word for change in changes for word in ("--set", change)] + ["--json"]

    def run(self, command: str, *words: object) -> Ran:
        config = [self._file] if command == "recut" else ["--config", self._file]
        return run_command(self._capsys, command, *words, *config, *self._options)

    def train(self, *words: str) -> "subprocess.Popen[str]":
        program = [sys.executable, "-m", "cutlayer.cli.main", "train", "--config", self._file]
        return subprocess.Popen(
            [*program, *self._options, *words], stdout=subprocess.PIPE, text=True
        )


def test_recut_without_any_process_and_the_old_settings_go_on(
    served: tuple[CliWorld, str],
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
    tmp_path: Path,
) -> None:
    owner = _Owner(capsys, served, tmp_path)
    assert owner.run("train").result["step"] == 6
    prompt = ("generate", "ab:", "--set", "sampling.max_new_tokens=4")
    replies = owner.run(*prompt).result["replies"]
    moved = owner.run("recut", "--lower", 2).result
    assert (moved["old"], moved["new"]) == ({"lower": 1, "upper": 3}, {"lower": 2, "upper": 3})
    assert (moved["step"], moved["to_client"], moved["to_server"]) == (6, [1], [])
    bytes_up, bytes_down = moved["bytes_up"], moved["bytes_down"]
    assert isinstance(bytes_up, int)
    assert isinstance(bytes_down, int)
    assert bytes_down > bytes_up > 0
    again = owner.run("recut", "--lower", 2)
    assert (again.code, again.result["moved"], again.result["bytes_up"]) == (0, False, 0)
    assert "already" in again.err
    caplog.clear()
    assert owner.run(*prompt).result["replies"] == replies
    said = [record.message for record in caplog.records if "re-cut" in record.message]
    assert len(said) == 1
    assert owner.run("export", "-o", owner.folder / "peft").result["step"] == 6
    # One more step with the settings of the old cut: it goes on at the new one.
    more = owner.run("train", "--set", "train.steps=7").result
    assert (more["step"], more["new_steps"]) == (7, 1)


def test_refusals_are_one_line_and_the_run_is_what_it_was(
    served: tuple[CliWorld, str], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    owner = _Owner(capsys, served, tmp_path)
    owner.run("train")
    for words, code, text in (
        (("--upper", 4), 2, "--share-adapter"),
        (("--lower", 3), 2, "at least one block"),
        (("--upper", 9), 2, "exceeds the model's 4 blocks"),
        ((), 2, "say where to cut"),
    ):
        refused = owner.run("recut", *words)
        assert refused.code == code
        assert text in str(refused.result["message"])
    assert owner.run("recut", "--upper", 4, "--share-adapter").result["to_server"] == [3]
    assert owner.run("train", "--set", "train.steps=7").result["new_steps"] == 1


def test_a_training_that_is_under_way_does_it_and_goes_on(
    served: tuple[CliWorld, str], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    owner = _Owner(capsys, served, tmp_path)
    training = owner.train("--set", "train.steps=250", "--set", "train.rows_per_step=1")
    try:
        deadline_s = time.monotonic() + 120
        while not is_attended(owner.folder / "run"):
            assert time.monotonic() < deadline_s
            assert training.poll() is None
            time.sleep(0.05)
        refused = owner.run("recut", "--upper", 4)
        assert (refused.code, refused.result["error"]) == (2, "ConfigError")
        moved = owner.run("recut", "--lower", 0, "--share-adapter").result
        assert (moved["to_server"], moved["new"]) == ([0], {"lower": 0, "upper": 3})
        assert owner.run("recut", "--lower", 0).result["moved"] is False
        back = owner.run("recut", "--lower", 2, "--upper", 3).result
        assert (back["to_client"], back["run_id"]) == ([0, 1], str(moved["run_id"])[:-1] + "2")
        out, _ = training.communicate(timeout=240)
    finally:
        training.kill()
    result = json.loads(out.splitlines()[-1])
    assert (training.returncode, result["step"], result["new_steps"]) == (0, 250, 250)
    assert result["run_id"] == back["run_id"]
    assert owner.run("export", "-o", owner.folder / "peft").result["step"] == 250


def test_a_run_that_another_command_uses_says_so(
    served: tuple[CliWorld, str], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    from cutlayer.client.client import Client

    owner = _Owner(capsys, served, tmp_path)
    with Client.from_file(served[0].client, [f"run.folder={tmp_path / 'run'}"]):
        refused = owner.run("recut", "--lower", 2)
    assert refused.code == 6
    assert "in use by a command that takes no re-cuts" in str(refused.result["message"])
