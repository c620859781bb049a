"""The store of results: whole files, one per run, one writer."""

import stat
from pathlib import Path

import msgspec
import pytest

from cutlayer.errors import ConfigError, StorageError
from cutlayer.suite.result import Origin, RunResult
from cutlayer.suite.spec import Method, RunSpec, Sizes
from cutlayer.suite.store import Store

SIZES = Sizes(train_rows=4, test_rows=4, steps=2, rows_per_step=2, micro_batch_rows=2, lr=1e-3)
ORIGIN = Origin(
    command="cutlayer eval suite", commit="c0ffee", versions={}, machine="m", began="2026-01-01"
)


def _spec(seed: int = 0) -> RunSpec:
    return RunSpec(task="topics", method=Method.SPLIT, seed=seed, sizes=SIZES)


def _result(seed: int = 0, error: str | None = None) -> RunResult:
    return RunResult(
        spec=_spec(seed),
        origin=ORIGIN,
        error=error,
        metrics={"accuracy": 0.1 + 0.2},
        items={"accuracy": (1.0, 0.0)},
        log_likelihoods=((-1e-300, -0.1), (-2.5, -3.0)),
    )


def test_what_is_put_comes_back_after_the_store_is_opened_again(tmp_path: Path) -> None:
    store = Store(tmp_path / "a" / "store")
    store.put(_result(1))
    store.put(_result(0))
    again = Store(store.folder)
    assert again.all() == [_result(0), _result(1)]
    assert again.get(_spec(0)) == _result(0)
    assert again.get(_spec(2)) is None


def test_a_result_is_readable_by_all_and_has_one_field_a_line(tmp_path: Path) -> None:
    Store(tmp_path).put(_result())
    path = tmp_path / f"{_spec().run_id}.json"
    assert stat.S_IMODE(path.stat().st_mode) == 0o644
    lines = path.read_text().splitlines()
    assert len(lines) == len(msgspec.structs.fields(RunResult)) + 2
    assert lines[-1] == "}"


def test_a_failed_run_is_kept_and_not_done_until_it_succeeds(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.put(_result(error="DataError: no"))
    assert not Store(tmp_path).is_done(_spec())
    store.put(_result())
    again = Store(tmp_path)
    assert again.is_done(_spec())
    assert len(again.all()) == 1


@pytest.mark.parametrize("damage", [b"", b'{"spec": 1}', b"\xff\xfe", b'{"nonsense": 1}'])
def test_a_damaged_file_is_named(tmp_path: Path, damage: bytes) -> None:
    (tmp_path / "topics.split.s0-1.json").write_bytes(damage)
    with pytest.raises(StorageError, match=r"topics\.split\.s0-1\.json is not a result"):
        Store(tmp_path)


def test_a_truncated_result_is_refused(tmp_path: Path) -> None:
    Store(tmp_path).put(_result())
    path = tmp_path / f"{_spec().run_id}.json"
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(StorageError, match=path.name):
        Store(tmp_path)


def test_a_copy_under_another_name_is_refused_and_a_renamed_file_is_replaced(
    tmp_path: Path,
) -> None:
    Store(tmp_path).put(_result(error="ConfigError: no"))
    path, other = tmp_path / f"{_spec().run_id}.json", tmp_path / "older-name.json"
    other.write_bytes(path.read_bytes())
    with pytest.raises(StorageError, match="same run"):
        Store(tmp_path)
    path.unlink()
    Store(tmp_path).put(_result())
    assert [p.name for p in tmp_path.glob("*.json")] == [path.name]


def test_a_second_suite_is_refused_and_leaves_the_first_its_work(tmp_path: Path) -> None:
    first, second = Store(tmp_path), Store(tmp_path)
    with first.locked():
        work = first.work_folder(_spec())
        with pytest.raises(StorageError, match="another suite"), second.locked():
            pass
        assert work.is_dir()
    with second.locked():
        assert not work.exists()


def test_what_another_suite_did_since_is_not_done_again(tmp_path: Path) -> None:
    early = Store(tmp_path)
    Store(tmp_path).put(_result())
    with early.locked():
        assert early.is_done(_spec())


def test_the_log_of_a_failure_goes_when_the_run_succeeds(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.log_file(_spec()).write_text("what it said")
    store.put(_result(error="DataError: no"))
    assert store.log_file(_spec()).exists()
    store.put(_result())
    assert not store.log_file(_spec()).exists()


def test_what_a_killed_suite_left_is_removed(tmp_path: Path) -> None:
    left = Store(tmp_path).work_folder(_spec()) / "task"
    left.mkdir()
    (tmp_path / ".x.json-0a0b0c0d.cutlayer-tmp").write_bytes(b"half")
    assert stat.S_IMODE(left.parent.stat().st_mode) == 0o700
    with Store(tmp_path).locked():
        assert sorted(p.name for p in tmp_path.iterdir()) == [".lock"]


def test_a_folder_without_results_is_no_store_to_report_on(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(ConfigError, match="holds no results"):
            Store.existing(folder)
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StorageError, match="is a file"):
        Store.existing(tmp_path / "file")
