"""A purge removes a run and keeps the spent budget."""

from pathlib import Path

import pytest

from cutlayer.errors import StorageError
from cutlayer.storage.log import DurableLog, read_log, reseal_log
from cutlayer.storage.purge import purge_run
from cutlayer.storage.vault import AesVault, open_run_vault


def _run(folder: Path) -> Path:
    (folder / "step-1").mkdir(parents=True)
    (folder / "step-1" / "adapter").write_bytes(b"x" * 100)
    (folder / "run.json").write_bytes(b"{}")
    with DurableLog(folder / "ledger.jsonl") as log:
        log.append({"epsilon": 1.0})
    return folder


def test_purge_removes_everything_but_the_ledger(tmp_path: Path) -> None:
    folder = _run(tmp_path / "run")
    result = purge_run(folder)
    assert (result.num_files, result.num_bytes) == (2, 102)
    assert result.kept == (folder / "ledger.jsonl",)
    assert not result.is_key_destroyed
    assert list(folder.iterdir()) == [folder / "ledger.jsonl"]
    assert list(read_log(folder / "ledger.jsonl")) == [{"epsilon": 1.0}]
    assert purge_run(folder).num_files == 0


def test_purge_removes_the_ledger_and_folder_when_told(tmp_path: Path) -> None:
    folder = _run(tmp_path / "run")
    assert purge_run(folder, keep_ledgers=False).kept == ()
    assert not folder.exists()


@pytest.mark.parametrize("keep_ledgers", [True, False])
def test_run_in_use_is_not_purged(tmp_path: Path, keep_ledgers: bool) -> None:
    folder = _run(tmp_path / "run")
    with DurableLog(folder / "ledger.jsonl"):
        with pytest.raises(StorageError, match="another process"):
            purge_run(folder, keep_ledgers=keep_ledgers)
        assert (folder / "step-1" / "adapter").exists()


def test_folder_that_is_no_run_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("dear")
    for folder in (tmp_path, tmp_path / "missing", tmp_path / "thesis.txt"):
        with pytest.raises(StorageError):
            purge_run(folder)
    assert (tmp_path / "thesis.txt").exists()


def test_purge_never_follows_links_out_of_the_run(tmp_path: Path) -> None:
    folder, outside = _run(tmp_path / "run"), tmp_path / "outside"
    outside.mkdir()
    (outside / "keep").touch()
    (folder / "link").symlink_to(outside, target_is_directory=True)
    (folder / "file-link").symlink_to(outside / "keep")
    purge_run(folder, keep_ledgers=False)
    assert (outside / "keep").exists()
    (tmp_path / "alias").symlink_to(_run(tmp_path / "run2"), target_is_directory=True)
    with pytest.raises(StorageError, match="not a folder"):
        purge_run(tmp_path / "alias")


def test_destroyed_key_makes_copies_unreadable(tmp_path: Path) -> None:
    folder, owner = _run(tmp_path / "run"), AesVault(b"k" * 32)
    copy = open_run_vault(folder, owner).seal(b"history", "c")
    assert purge_run(folder).is_key_destroyed
    with pytest.raises(StorageError, match="key that sealed it"):
        open_run_vault(folder, owner).open(copy, "c")


def _encrypted_run(folder: Path, owner: AesVault) -> Path:
    folder.mkdir()
    with DurableLog(folder / "ledger.jsonl", open_run_vault(folder, owner)) as log:
        for number in range(3):
            log.append({"epsilon": number})
    return folder


def test_ledger_of_an_encrypted_run_stays_readable_with_the_owners_key(tmp_path: Path) -> None:
    owner = AesVault(b"k" * 32)
    folder = _encrypted_run(tmp_path / "run", owner)
    with pytest.raises(StorageError, match="give the storage key"):
        purge_run(folder)
    with pytest.raises(StorageError, match="key that sealed it"):
        purge_run(folder, owner=AesVault(b"w" * 32))
    assert (folder / "vault.key").exists()
    assert purge_run(folder, owner=owner).is_key_destroyed
    assert [line["epsilon"] for line in read_log(folder / "ledger.jsonl", owner)] == [0, 1, 2]
    DurableLog(folder / "ledger.jsonl", owner).close()


def test_purge_that_was_interrupted_after_resealing_can_be_repeated(tmp_path: Path) -> None:
    owner = AesVault(b"k" * 32)
    folder = _encrypted_run(tmp_path / "run", owner)
    reseal_log(folder / "ledger.jsonl", open_run_vault(folder, owner), owner)
    assert purge_run(folder, owner=owner).is_key_destroyed
    assert len(list(read_log(folder / "ledger.jsonl", owner))) == 3


def test_encrypted_run_without_its_key_can_still_be_purged_with_the_ledger(tmp_path: Path) -> None:
    folder = _encrypted_run(tmp_path / "run", AesVault(b"k" * 32))
    purge_run(folder, keep_ledgers=False)
    assert not folder.exists()
