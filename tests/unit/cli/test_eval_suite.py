"""`cutlayer eval suite` and `report`: what they list, refuse and end with."""

import json
import shlex
from pathlib import Path

import pytest

from cutlayer.cli.main import run
from cutlayer.suite.profiles import Choice, specs_of
from cutlayer.suite.result import Origin, RunResult
from cutlayer.suite.store import Store

ORIGIN = Origin(command="c", commit="unknown", versions={}, machine="m", began="2026-01-01")


def _suite(folder: Path, *words: str) -> int:
    return run(["eval", "suite", "--out", str(folder / "store"), *words])


def _json(capsys: pytest.CaptureFixture[str]) -> dict[str, object]:
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert isinstance(found, dict)
    return found


def test_a_list_says_what_is_done_failed_and_missing_and_writes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _suite(tmp_path, "--list", "--only", "xsum", "--json") == 0
    assert not (tmp_path / "store").exists()
    capsys.readouterr()
    specs = [spec for spec in specs_of("small", Choice()) if spec.task == "xsum"]
    store = Store(tmp_path / "store")
    store.put(RunResult(spec=specs[0], origin=ORIGIN))
    store.put(RunResult(spec=specs[1], origin=ORIGIN, error="DataError: no"))
    assert _suite(tmp_path, "--list", "--only", "xsum", "--json") == 0
    assert _json(capsys)["runs"] == [
        {"run_id": spec.run_id, "state": state}
        for spec, state in zip(specs, ("done", "failed", "missing"), strict=True)
    ]


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (("--profile", "tiny"), "choose one of small, medium, full"),
        (("--only", "nothing"), "no run has 'nothing' in its id"),
        (("--data", "/nowhere/at/all"), "no such folder"),
    ],
)
def test_what_cannot_be_meant_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: tuple[str, ...], complaint: str
) -> None:
    assert _suite(tmp_path, *words) == 2
    assert complaint in capsys.readouterr().err
    assert not (tmp_path / "store").exists()


def test_a_failed_run_is_named_kept_and_makes_the_exit_code(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    empty = tmp_path / "no rows"
    empty.mkdir()
    words = ("--data", str(empty), "--device", "meta")
    assert _suite(tmp_path, "--only", "xsum.untuned", "--json", *words) == 1
    said = capsys.readouterr()
    assert "1 of 1: xsum.untuned.s0-" in said.err
    assert "failed: xsum.untuned.s0-" in said.err
    assert json.loads(said.out.splitlines()[-1])["message"].startswith("1 of 1 runs failed")
    (kept,) = Store(tmp_path / "store").all()
    assert kept.error is not None
    assert kept.error.startswith("DataError: ")
    # A shell takes the command as it was said.
    again = ["cutlayer", "eval", "suite", "--profile", "small", *words, "--only", kept.spec.run_id]
    assert shlex.split(kept.origin.command) == again


def test_a_damaged_result_stops_the_suite_before_a_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "x.json").write_text("{")
    assert _suite(tmp_path) == 6
    assert "x.json is not a result" in capsys.readouterr().err


def test_a_page_needs_a_folder_and_results(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["eval", "report", str(tmp_path)]) == 2
    assert "holds no results" in capsys.readouterr().err
    Store(tmp_path).put(RunResult(spec=specs_of("small", Choice())[0], origin=ORIGIN))
    assert run(["eval", "report", str(tmp_path), "--out", str(tmp_path / "no" / "page.md")]) == 2
    assert "name a file in a folder that exists" in capsys.readouterr().err
