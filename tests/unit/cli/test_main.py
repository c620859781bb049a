"""Exit codes, error lines, and what the program does before torch is there."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from cutlayer.cli.main import exit_code_of
from cutlayer.errors import EXIT_CODES, CutlayerError, ModelError, SpecMismatch
from tests.unit.cli.cli_world import CliWorld, run_command

ROOT = Path(__file__).parents[3]
COMMANDS = (
    ("demo",),
    ("provision",),
    ("serve",),
    ("train",),
    ("generate",),
    ("chat",),
    ("api",),
    ("eval",),
    ("simulate",),
    ("status",),
    ("leave",),
    ("export",),
    ("doctor",),
    ("assets",),
    ("purge",),
    ("audit",),
    ("audit", "attack"),
    ("privacy", "plan"),
    ("privacy", "show"),
    *(("assets", name) for name in ("list", "fetch", "manifest")),
    *(("enclave", name) for name in ("serve", "train", "generate", "export")),
    *(
        ("provision", name)
        for name in (
            *("init", "request", "show", "approve", "install", "renew", "revoke", "publish"),
            *("update", "check"),
        )
    ),
)


def test_version_names_the_program(capsys: pytest.CaptureFixture[str]) -> None:
    ran = run_command(capsys, "--version")
    assert ran.code == 0
    assert re.fullmatch(r"cutlayer \d+\.\d+\.\d+\n", ran.out)


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_every_command_has_help(
    command: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    ran = run_command(capsys, *command, "--help")
    assert ran.code == 0
    assert "--json" in ran.out or command == ("assets",)


def test_help_and_version_do_not_import_torch() -> None:
    code = (
        "import sys; sys.argv = ['cutlayer', '--help']\n"
        "import cutlayer.cli.main as program\n"
        "try: program.main()\n"
        "finally: print('torch' in sys.modules, 'transformers' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.splitlines()[-1] == "False False", done.stderr


def test_openmp_waits_passively_before_torch_is_imported() -> None:
    code = (
        "import sys; sys.argv = ['cutlayer', '--version']\n"
        "import cutlayer.cli.main as program\n"
        "try: program.main()\n"
        "except SystemExit: pass\n"
        "import os; print(os.environ['OMP_WAIT_POLICY'], 'torch' in sys.modules)"
    )
    without = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=without, capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1] == "PASSIVE False"


@pytest.mark.parametrize("kind", EXIT_CODES, ids=lambda kind: kind.__name__)
def test_each_error_has_its_own_documented_exit_code(kind: type[CutlayerError]) -> None:
    code = exit_code_of(kind("x"))
    assert code == EXIT_CODES[kind]
    text = (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")
    assert re.search(rf"^\| {code} \|.*\b{kind.__name__}\b", text, re.MULTILINE)


def test_a_subclass_takes_the_code_of_its_nearest_class() -> None:
    class _Special(ModelError):
        pass

    assert exit_code_of(_Special("x")) == EXIT_CODES[ModelError]
    assert exit_code_of(SpecMismatch("x")) != exit_code_of(ModelError("x"))


@pytest.mark.parametrize("command", ["serve", "train", "generate", "chat", "doctor"])
def test_a_missing_settings_file_is_one_line_and_code_2(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["x"] if command == "generate" else []
    ran = run_command(capsys, command, *words, "--config", tmp_path / "none.toml", "--json")
    assert ran.code == 2
    assert ran.err.startswith("error: cannot read settings")
    assert ran.err.count("\n") == 1
    assert ran.result["error"] == "ConfigError"
    assert ran.result["exit_code"] == 2


def test_an_unknown_key_names_the_nearest_one(
    world: CliWorld, capsys: pytest.CaptureFixture[str]
) -> None:
    ran = run_command(capsys, "train", "--config", world.client, "--set", "train.lrr=1")
    assert ran.code == 2
    assert "did you mean lr?" in ran.err


def test_a_wrong_command_line_has_code_2_and_json(capsys: pytest.CaptureFixture[str]) -> None:
    ran = run_command(capsys, "train", "--json")
    assert ran.code == 2
    assert ran.result == {
        "error": "UsageError",
        "message": "the command line is wrong; see the text above",
        "exit_code": 2,
    }


def test_debug_lets_the_error_through(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(CutlayerError, match="cannot read settings"):
        run_command(capsys, "--debug", "serve", "--config", tmp_path / "none.toml")


def test_interrupt_is_130(tmp_path: Path) -> None:
    code = (
        "from unittest import mock; import sys\n"
        "from cutlayer.cli import assets\n"
        "from cutlayer.cli.main import run\n"
        "from cutlayer.data import assets as data\n"
        "def stop(*_): raise KeyboardInterrupt\n"
        "data.fetch = stop\n"
        "sys.exit(run(['assets', 'fetch', 'x']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (130, "interrupted; what was saved stays\n")


def test_error_text_with_a_second_line_stays_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "bad.toml"
    config.write_text("[model]\npath = \n")
    ran = run_command(capsys, "serve", "--config", config, "--json")
    assert ran.code == 2
    assert ran.err.count("\n") == 1
    assert json.loads(ran.out)["error"] == "ConfigError"
