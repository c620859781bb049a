"""One run: what it hands back when it cannot be done, and which method it takes."""

import inspect
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from cutlayer.suite.result import RunResult
from cutlayer.suite.spec import Method, RunSpec, Sizes
from cutlayer.suite.work import RESULT_FILE, WorkOptions, function_of, run_one

SIZES = Sizes(train_rows=4, test_rows=4, steps=2, rows_per_step=2, micro_batch_rows=2, lr=1e-3)


def _spec(task: str, source: str) -> RunSpec:
    return RunSpec(task=task, method=Method.SPLIT, seed=0, sizes=SIZES, source=source)


def test_a_known_error_becomes_a_failed_result(tmp_path: Path) -> None:
    result = run_one(_spec("rte", str(tmp_path)), tmp_path, WorkOptions(command="again"))
    assert result.error is not None
    assert result.error.startswith("DataError: ")
    assert result.metrics == {}
    assert result.origin.command == "again"


def test_a_defect_becomes_a_failed_result_without_its_message(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def prepare(*arguments: object) -> None:
        raise KeyError("a private text")

    monkeypatch.setattr("cutlayer.suite.rows.prepare", prepare)
    result = run_one(_spec("rte", "packaged"), tmp_path, WorkOptions())
    assert result.error is not None
    assert result.error.startswith("a defect: KeyError at test_work.py:")
    assert "private" not in result.error
    assert "Traceback" in capsys.readouterr().err


def test_the_commit_is_that_of_the_beginning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commits = iter(["first", "later", "later"])
    monkeypatch.setattr("cutlayer.suite.origin.commit_of", lambda package: next(commits))
    result = run_one(_spec("rte", str(tmp_path)), tmp_path, WorkOptions())
    assert result.origin.commit == "first"


@pytest.mark.parametrize(
    ("method", "name"),
    [
        (Method.UNTUNED, "run_central"),
        (Method.CENTRALISED, "run_central"),
        (Method.SPLIT, "run_split"),
        (Method.TOGETHER, "run_together"),
        (Method.AUDIT, "run_audited"),
    ],
)
def test_every_method_has_a_function_that_takes_a_run(method: Method, name: str) -> None:
    function = function_of(method)
    assert function.__name__ == name
    parameters = list(inspect.signature(function).parameters)
    assert parameters == ["spec", "task", "folder", "compute", "cache"]


def _process(*words: object) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-m", "cutlayer.suite.work", *map(str, words)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_the_process_writes_its_result_and_says_that_it_failed(tmp_path: Path) -> None:
    spec, folder = tmp_path / "spec.json", tmp_path / "run"
    spec.write_bytes(msgspec.json.encode(_spec("nonsense", "packaged")))
    done = _process(spec, folder, "--threads", 1)
    assert done.returncode == 1
    result = msgspec.json.decode((folder / RESULT_FILE).read_bytes(), type=RunResult)
    assert result.error is not None
    assert "'nonsense'" in result.error
    assert result.error in done.stderr
    assert "1 thread," in result.origin.machine


def test_a_file_that_is_no_spec_is_named(tmp_path: Path) -> None:
    spec = tmp_path / "spec.json"
    for content, words in ((b"{}", "not the spec of a run"), (None, "cannot read")):
        spec.unlink(missing_ok=True)
        if content is not None:
            spec.write_bytes(content)
        done = _process(spec, tmp_path / "run")
        assert done.returncode == 1
        assert "spec.json" in done.stderr
        assert words in done.stderr
