"""`cutlayer runs` on real folders of a server and an owner."""

import json
import os
from pathlib import Path

import pytest

from cutlayer.cli.main import run
from cutlayer.client.run_state import Progress, RunState
from cutlayer.client.settings import RunSettings
from cutlayer.dashboard.stored import StoredKind, find_run, run_details, stored_runs
from cutlayer.errors import ConfigError, StorageError
from cutlayer.storage.steps import StepStore
from cutlayer.storage.vault import new_key_file
from tests.unit.dashboard.store_world import finish_round, new_store

Result = dict[str, object]


@pytest.fixture
def state(tmp_path: Path) -> Path:
    """A server's folder: a federation, and a run of the clinic at step 4."""
    folder = tmp_path / "state"
    folder.mkdir(mode=0o700)
    new_store(folder / "federations" / "reviews").close()
    steps = StepStore(folder / "runs" / "clinic" / "a1b2")
    for step in (2, 4):
        files = {"state.json": json.dumps({"step": step, "adapter": {"rank": 8}}).encode()}
        steps.save(step, files, is_pinned=step == 2)
    return folder


def _owner_run(folder: Path, key_file: Path | None = None) -> Path:
    owned = RunState(RunSettings(folder=folder, key_file=key_file))
    owned.save(Progress(step=3, best_step=2, evaluations={"2": 1.5}), {"head": {}}, False)
    owned.close()
    return folder


def _run(capsys: pytest.CaptureFixture[str], *words: object, code: int = 0) -> tuple[str, Result]:
    assert run(["runs", *map(str, words)]) == code
    text = capsys.readouterr().out
    assert run(["runs", *map(str, words), "--json"]) == code
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert isinstance(result, dict)
    return text, result


def _content(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not path.name.endswith(("-shm", "-wal"))
    }


def test_a_list_names_federations_and_runs(state: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text, result = _run(capsys, "list", "--state", state)
    runs = result["runs"]
    assert isinstance(runs, list)
    assert [(r["kind"], r["name"], r["num_done"], r["saved"]) for r in runs] == [
        ("federation", "reviews", 3, [1, 2, 3]),
        ("server run", "clinic/a1b2", 4, [2, 4]),
    ]
    assert "clinic/a1b2" in text
    assert "round 3" in text


def test_a_federation_shows_members_rounds_and_failures(
    state: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text, result = _run(capsys, "show", "reviews", "--state", state)
    for word in ("tweets", "joined", "left", "3 of 4", "QuorumNotMet", "published by", "52.0 s"):
        assert word in text
    rounds, failed = result["rounds"], result["failed_attempts"]
    assert isinstance(rounds, list)
    assert isinstance(failed, list)
    assert [r["round"] for r in rounds] == [1, 2, 3]
    assert [(a["round"], a["number"]) for a in failed] == [(2, 1)]
    assert result["digest"] == f"{3:064x}"
    _, short = _run(capsys, "show", "reviews", "--state", state, "--last", 1)
    assert isinstance(short["rounds"], list)
    assert [r["round"] for r in short["rounds"]] == [3]


def test_a_servers_run_shows_its_steps_and_adapter(
    state: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text, result = _run(capsys, "show", "clinic/a1b2", "--state", state)
    assert "rank 8" in text
    assert "best or kept" in text
    assert result["details"] == {"step": 4, "adapter": {"rank": 8}}


def test_an_owners_run_shows_where_it_stands(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = _owner_run(tmp_path / "notes")
    text, _ = _run(capsys, "show", "notes", "--state", folder)
    assert "best step    2" in text
    assert [run.name for run in stored_runs(tmp_path)] == ["notes"]


def test_what_is_encrypted_is_listed_and_not_opened(tmp_path: Path) -> None:
    new_key_file(tmp_path / "key")
    folder = _owner_run(tmp_path / "notes", tmp_path / "key")
    found = find_run(folder, "notes")
    assert (found.kind, found.num_done) == (StoredKind.OWNER_RUN, 3)
    assert run_details(found) == {}


def test_looking_changes_nothing(state: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = _content(state)
    _run(capsys, "list", "--state", state)
    _run(capsys, "show", "reviews", "--state", state)
    assert _content(state) == before


def test_a_store_that_is_being_written_can_be_looked_at(
    state: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with new_store(state / "federations" / "other", name="other") as store:
        _run(capsys, "show", "other", "--state", state)
        finish_round(store, 4)
        _, result = _run(capsys, "show", "other", "--state", state)
        assert result["num_done"] == 4
        finish_round(store, 5)


@pytest.mark.parametrize("command", [("list",), ("show", "reviews")])
def test_a_missing_folder_is_refused(
    command: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["runs", *command, "--state", str(tmp_path / "none")]) == 2
    assert "is no folder" in capsys.readouterr().err


def test_an_empty_folder_holds_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text, result = _run(capsys, "list", "--state", tmp_path)
    assert "no federation and no run" in text
    assert result == {"runs": []}


def test_an_unknown_name_is_answered_with_the_known_ones(state: Path) -> None:
    with pytest.raises(ConfigError, match="it holds reviews, clinic/a1b2"):
        find_run(state, "review")


def test_a_damaged_step_is_said(state: Path) -> None:
    path = state / "runs" / "clinic" / "a1b2" / "step-00000004" / "state.json"
    path.write_bytes(b"{")
    with pytest.raises(StorageError, match="damaged"):
        run_details(find_run(state, "clinic/a1b2"))


def test_a_damaged_federation_is_said(state: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = state / "federations" / "reviews" / "federation.sqlite"
    for beside in path.parent.glob("federation.sqlite-*"):
        os.unlink(beside)
    path.write_bytes(b"no database" * 1000)
    assert run(["runs", "list", "--state", str(state)]) == 6
    assert "restore the folder" in capsys.readouterr().err
