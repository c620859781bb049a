"""Remove one run's state on the owner's disk: adapters, optimizer, released history, keys.

It does not promise that the bytes are gone: file systems and solid-state disks keep old copies
that no program can reach and overwrite. What makes a purge final is encryption: the run's own key
(`vault.key`) is overwritten and deleted first, and without it the rest is unreadable wherever
copies lie, as long as the owner's key that sealed it stays secret or is destroyed too.
The privacy ledger stays unless told otherwise: budgets that were spent stay spent. An encrypted one
is sealed again with the owner's key first, because the run's key goes.
"""

import os
import secrets
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from cutlayer.errors import StorageError
from cutlayer.storage.files import explain_os_errors, sync_folder, write_all
from cutlayer.storage.log import locked_log, read_log, reseal_log
from cutlayer.storage.vault import Vault, open_run_vault

__all__ = ["Purged", "purge_run"]

_RUN_KEY = "vault.key"


@dataclass(frozen=True, kw_only=True)
class Purged:
    """What a purge did."""

    num_files: int
    """Files removed."""
    num_bytes: int
    """Bytes that they had."""
    kept: tuple[Path, ...]
    """Ledger files that remain."""
    is_key_destroyed: bool
    """Whether an encryption key of the run was destroyed, which makes its copies unreadable."""


def purge_run(
    folder: Path,
    ledgers: Sequence[str] = ("ledger.jsonl",),
    keep_ledgers: bool = True,
    markers: Sequence[str] = ("ledger.jsonl", "run.json"),
    owner: Vault | None = None,
) -> Purged:
    """Remove the state of one run.

    Args:
        folder: the run's folder.
        ledgers: paths within it that record spent budget.
        keep_ledgers: False removes these too, and then the folder itself.
        markers: a folder without any of these is not a run and is refused.
        owner: the owner's vault (`open_vault`); needed to keep the ledger of an encrypted run.

    Raises:
        StorageError: not a run, still in use, or an encrypted ledger without the owner's key.
    """
    _check_is_run(folder, markers)
    present = [folder / name for name in ledgers if (folder / name).exists()]
    with ExitStack() as locks:
        # Whoever writes the run holds its ledger's lock: a client may be running on this folder.
        for ledger in present:
            locks.enter_context(locked_log(ledger))
        kept = tuple(present) if keep_ledgers else ()
        for ledger in kept:
            _free_from_run_key(ledger, folder, owner)
        return _remove(folder, kept)


def _remove(folder: Path, kept: tuple[Path, ...]) -> Purged:
    with explain_os_errors(f"purge {folder}"):
        is_key_destroyed = _destroy_key(folder / _RUN_KEY)
        files = [path for path in _files(folder) if path not in kept]
        num_bytes = sum(path.lstat().st_size for path in files)
        for path in files:
            path.unlink()
        _remove_empty_folders(folder)
    return Purged(
        num_files=len(files), num_bytes=num_bytes, kept=kept, is_key_destroyed=is_key_destroyed
    )


def _check_is_run(folder: Path, markers: Sequence[str]) -> None:
    if folder.is_symlink() or not folder.is_dir():
        raise StorageError(f"{folder} is not a folder; give the folder of one run")
    if not any((folder / marker).exists() for marker in markers):
        raise StorageError(
            f"{folder} holds none of {', '.join(markers)}, so it is not a run; nothing was removed"
        )


def _free_from_run_key(ledger: Path, folder: Path, owner: Vault | None) -> None:
    if not (folder / _RUN_KEY).exists() or b'"sealed":' not in ledger.read_bytes():
        return
    if owner is None:
        raise StorageError(
            f"{ledger} is encrypted with the key that a purge destroys; give the storage key so "
            "that the ledger can be kept, or purge the ledger too"
        )
    try:
        reseal_log(ledger, open_run_vault(folder, owner), owner)
    except StorageError:
        # A purge that was interrupted after this step has done it already.
        next(read_log(ledger, owner), None)


def _destroy_key(path: Path) -> bool:
    if not path.exists():
        return False
    descriptor = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        write_all(descriptor, secrets.token_bytes(max(1, path.stat().st_size)))
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    path.unlink()
    sync_folder(path.parent)
    return True


def _files(folder: Path) -> list[Path]:
    # Links are removed, never followed: a purge must not reach outside the run.
    found: list[Path] = []
    for parent, folders, names in os.walk(folder, followlinks=False):
        links = [name for name in folders if Path(parent, name).is_symlink()]
        found += [Path(parent, name) for name in [*names, *links]]
    return found


def _remove_empty_folders(folder: Path) -> None:
    for parent, _, _ in os.walk(folder, topdown=False):
        if not os.listdir(parent):
            os.rmdir(parent)
    sync_folder(folder if folder.exists() else folder.parent)
