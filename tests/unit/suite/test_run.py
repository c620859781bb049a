"""The suite's own part: what becomes of runs that end in strange ways."""

from pathlib import Path

import pytest

from cutlayer.errors import StorageError
from cutlayer.suite.run import SuiteOptions, run_suite
from cutlayer.suite.spec import Method, RunSpec, Sizes
from cutlayer.suite.store import Store

SIZES = Sizes(train_rows=4, test_rows=4, steps=2, rows_per_step=2, micro_batch_rows=2, lr=1e-3)


def _specs(number: int) -> list[RunSpec]:
    return [
        RunSpec(task="topics", method=Method.SPLIT, seed=seed, sizes=SIZES)
        for seed in range(number)
    ]


def _runs_are(script: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every run is this shell script; its fourth word is the run's folder."""
    python = folder / "python"
    python.write_text(f"#!/bin/sh\n{script}\n")
    python.chmod(0o700)
    monkeypatch.setattr("sys.executable", str(python))


@pytest.mark.parametrize("written", ["{", '{"seconds": null}', '{"of_a_newer_version": 1}'])
def test_a_result_that_cannot_be_read_ends_one_run_and_not_the_suite(
    written: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _runs_are(f"echo it said this; echo '{written}' > $4/result.json", tmp_path, monkeypatch)
    store = Store(tmp_path / "store")
    results = run_suite(_specs(2), store, SuiteOptions(jobs=2), lambda line: None)
    assert [result.error for result in results] == [
        "ended with exit code 0 and no result that can be read; the log has more"
    ] * 2
    logs = sorted((store.folder / "logs").iterdir())
    assert [log.read_text() for log in logs] == ["it said this\n"] * 2
    assert not (store.folder / "work").exists()


def test_a_result_is_kept_whatever_becomes_of_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The second takes its log away, which cannot be kept then; both end between two looks.
    _runs_are("case $4 in *s1-*) sleep 0.5; rm $4/log.txt;; esac; exit 3", tmp_path, monkeypatch)
    monkeypatch.setattr("cutlayer.suite.run._POLL_S", 1.0)
    store = Store(tmp_path / "store")
    with pytest.raises(StorageError, match="keep the log of topics"):
        run_suite(_specs(2), store, SuiteOptions(jobs=2), lambda line: None)
    [kept] = Store(store.folder).all()
    assert kept.spec.seed == 0
    assert kept.error is not None
    assert kept.error.startswith("ended with exit code 3")
