"""The store: whole rounds or none, one writer, readers beside it, and a SIGKILL at any moment."""

import os
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

import pytest
import torch

from cutlayer.errors import StorageError
from cutlayer.federation.checkpoints import Checkpoint
from cutlayer.federation.store import FederationStore
from cutlayer.federation.store_rows import Pinned
from cutlayer.storage.vault import AesVault
from tests.unit.federation.store_rounds import KEY, checkpoint_of, commit, is_whole, row_of


def test_a_round_comes_back_as_it_was_written(tmp_path: Path) -> None:
    with FederationStore(tmp_path, "oncology") as store:
        store.pin(Pinned(fingerprint={"model": "x"}, layout={KEY: [64, 64]}, member="a"))
        for name in "abc":
            store.add_member(name)
        commit(store, 1)
    with FederationStore(tmp_path, "oncology") as store:
        assert store.round == 1
        assert store.rounds() == [row_of(1)]
        assert store.round_row(1) == row_of(1)
        assert store.round_row(2) is None
        checkpoint = store.checkpoint()
        assert checkpoint is not None
        assert torch.equal(checkpoint.state[KEY], checkpoint_of(1).state[KEY])
        assert checkpoint.strategy[f"{KEY}.m"].dtype == torch.float64
        pinned = store.pinned()
        assert pinned is not None
        assert (pinned.fingerprint, pinned.layout) == ({"model": "x"}, {KEY: [64, 64]})
        counts = {row.name: (row.num_rounds, row.num_straggled) for row in store.members()}
        assert counts == {"a": (1, 0), "b": (1, 0), "c": (0, 1)}


def test_a_hidden_sum_and_the_sealed_state_come_back(tmp_path: Path) -> None:
    with FederationStore(tmp_path, "oncology") as store:
        sums = torch.tensor([-(2**63), 2**63 - 1])
        checkpoint = Checkpoint(state={}, hidden_sum=sums, sealed=b"\0sealed")
        store.commit_round(row_of(1), checkpoint)
        found = store.checkpoint()
        assert found is not None
        assert found.hidden_sum is not None
        assert torch.equal(found.hidden_sum, sums)
        assert found.sealed == b"\0sealed"


def test_the_newest_three_checkpoints_stay(tmp_path: Path) -> None:
    with FederationStore(tmp_path, "oncology") as store:
        for number in range(1, 6):
            commit(store, number)
        names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
        assert names == ["step-00000003", "step-00000004", "step-00000005"]
        assert [row.number for row in store.rounds(last=2)] == [4, 5]
        assert len(store.rounds()) == 5


def test_files_of_a_round_that_was_never_finished_are_removed(tmp_path: Path) -> None:
    with FederationStore(tmp_path, "oncology") as store:
        commit(store, 1)
        store.begin_attempt(2, 1, ["a"])
        store._checkpoints.save(2, checkpoint_of(9).files())
    with FederationStore(tmp_path, "oncology") as store:
        assert store.round == 1
        assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000001"]
        assert store.attempts(2)[0].outcome == "void"
        assert store.last_attempt(2) == 1


def test_one_process_writes_and_the_other_is_told_which(tmp_path: Path) -> None:
    with (
        FederationStore(tmp_path, "oncology"),
        pytest.raises(StorageError, match=f"process {os.getpid()}"),
    ):
        FederationStore(tmp_path, "oncology")
    FederationStore(tmp_path, "oncology").close()


def test_a_reader_works_while_the_writer_lives_and_after_it(tmp_path: Path) -> None:
    with FederationStore(tmp_path, "oncology") as store:
        store.add_member("a")
        commit(store, 1)
        reader = FederationStore.read_only(tmp_path)
        assert reader.federation == "oncology"
        assert reader.round == 1
        commit(store, 2)
        store.publish("a", 2, {"loss": 0.5})
        assert [row.number for row in reader.rounds()] == [1, 2]
        assert [row.name for row in reader.members()] == ["a"]
        assert reader.metrics(last=1)[0].value == 0.5
        reader.close()
    reader = FederationStore.read_only(tmp_path)
    assert reader.round == 2
    reader.close()
    with pytest.raises(StorageError, match="holds no federation"):
        FederationStore.read_only(tmp_path / "nowhere")


def test_a_readers_connection_cannot_write(tmp_path: Path) -> None:
    with FederationStore(tmp_path, "oncology"):
        reader = FederationStore.read_only(tmp_path)
        with pytest.raises(StorageError, match="readonly"), reader._database.transaction() as c:
            c.execute("DELETE FROM federation")
        reader.close()


def test_a_folder_belongs_to_one_federation(tmp_path: Path) -> None:
    FederationStore(tmp_path, "oncology").close()
    with pytest.raises(StorageError, match="store of federation oncology, not of cardiology"):
        FederationStore(tmp_path, "cardiology")


def test_missing_files_of_the_last_round_are_reported(tmp_path: Path) -> None:
    with FederationStore(tmp_path, "oncology") as store:
        commit(store, 1)
    (tmp_path / "checkpoints" / "step-00000001").rename(tmp_path / "elsewhere")
    with pytest.raises(StorageError, match="no files of round 1"):
        FederationStore(tmp_path, "oncology")


def test_a_damaged_database_is_reported(tmp_path: Path) -> None:
    FederationStore(tmp_path, "oncology").close()
    (tmp_path / "federation.sqlite").write_bytes(b"not a database" * 1000)
    with pytest.raises(StorageError, match="restore the folder"):
        FederationStore(tmp_path, "oncology")


def test_another_format_is_reported(tmp_path: Path) -> None:
    with FederationStore(tmp_path, "oncology") as store, store._database.transaction() as cursor:
        cursor.execute("PRAGMA user_version = 9")
    with pytest.raises(StorageError, match="format 9"):
        FederationStore(tmp_path, "oncology")


def test_files_are_private_and_states_sealed(tmp_path: Path) -> None:
    vault = AesVault(bytes(32))
    folder = tmp_path / "store"
    with FederationStore(folder, "oncology", vault) as store:
        commit(store, 1)
        assert folder.stat().st_mode & 0o077 == 0
        for path in folder.rglob("*"):
            assert path.stat().st_mode & 0o077 == 0, path
        files = [p for p in (folder / "checkpoints").rglob("*") if p.is_file()]
        assert all(path.read_bytes().startswith(b"CLV1") for path in files)
    with (
        FederationStore(folder, "oncology", AesVault(bytes(31) + b"x")) as store,
        pytest.raises(StorageError, match="sealed with key"),
    ):
        store.checkpoint()


def test_times_are_utc_texts_of_the_given_clock(tmp_path: Path) -> None:
    clock = datetime(2026, 11, 21, 7, 30, tzinfo=UTC)
    with FederationStore(tmp_path, "oncology", now=lambda: clock) as store:
        store.add_member("a")
        assert store.members()[0].joined_at == "2026-11-21T07:30:00.000+00:00"


def test_a_writer_killed_at_any_moment_leaves_whole_rounds(tmp_path: Path) -> None:
    """25 SIGKILLs: what the writer acknowledged is there, and the newest round is whole."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.unit.federation.store_killer", str(tmp_path / "s"), "25"],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        cwd=Path(__file__).parents[3],
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 10, "the writers were killed before they wrote much"


def test_a_store_that_lost_a_round_is_noticed(tmp_path: Path) -> None:
    """The check of the test above can fail."""
    with FederationStore(tmp_path, "oncology") as store:
        commit(store, 1)
        assert is_whole(store, 1)
        assert not is_whole(store, 2)
        store._checkpoints.save(1, checkpoint_of(5).files())
        assert not is_whole(store, 1)
