"""Saved training steps of one run: each a folder that exists whole or not at all.

It does not know what the files mean, nor which step is right to go back to.
"""

import re
import shutil
from collections.abc import Mapping
from pathlib import Path

from cutlayer.errors import StorageError
from cutlayer.storage.files import (
    explain_os_errors,
    private_folder,
    read_private,
    remove_leftovers,
    replace_folder,
    sync_folder,
    write_atomic,
)
from cutlayer.storage.vault import NoVault, Vault

__all__ = ["StepStore"]

_NAME = re.compile(r"step-(\d{8})")
_PIN = "pinned"


class StepStore:
    """Keeps the newest steps and the newest pinned ones; both sides of a run use it.

    Two of each are kept: a side saves step s only after the other finished it, so the newest step
    that both hold is always among the last two of either.
    """

    def __init__(self, folder: Path, vault: Vault | None = None, num_kept: int = 2) -> None:
        self._folder = private_folder(folder)
        self._vault = NoVault() if vault is None else vault
        self._num_kept = num_kept
        remove_leftovers(folder)

    def steps(self) -> list[int]:
        """Every saved step, ascending."""
        matches = (_NAME.fullmatch(path.name) for path in self._folder.iterdir())
        return sorted(int(match[1]) for match in matches if match)

    def save(self, step: int, files: Mapping[str, bytes], is_pinned: bool = False) -> None:
        """Write a step, durable when this returns, then drop what is too old.

        Raises:
            StorageError: full disk or no permission; every step saved earlier is intact.
        """

        def fill(folder: Path) -> None:
            for name, data in files.items():
                write_atomic(folder / name, self._vault.seal(data, _context(step, name)))
            if is_pinned:
                write_atomic(folder / _PIN, b"")

        replace_folder(self._path(step), fill)
        self._prune()

    def load(self, step: int) -> dict[str, bytes]:
        """The files of a saved step.

        Raises:
            StorageError: the step is not saved, or a file was changed or cannot be read.
        """
        folder = self._path(step)
        if not folder.is_dir():
            raise StorageError(f"{self._folder} has no step {step}; it has {self.steps()}")
        paths = [path for path in sorted(folder.iterdir()) if path.name != _PIN]
        return {p.name: self._vault.open(read_private(p), _context(step, p.name)) for p in paths}

    def drop_after(self, step: int) -> None:
        """Forget the steps after `step`: the run goes back to it and makes them again."""
        for later in (saved for saved in self.steps() if saved > step):
            self._drop(later)

    def _prune(self) -> None:
        steps = self.steps()
        pinned = [step for step in steps if (self._path(step) / _PIN).exists()]
        kept = {*steps[-self._num_kept :], *pinned[-self._num_kept :]}
        for step in steps:
            if step not in kept:
                self._drop(step)

    def _drop(self, step: int) -> None:
        # Renamed first: a crash in the middle of the removal must not leave half a step.
        doomed = self._folder / f".step-{step:08d}.cutlayer-tmp"
        with explain_os_errors(f"remove {self._path(step)}"):
            self._path(step).rename(doomed)
            sync_folder(self._folder)
            shutil.rmtree(doomed)

    def _path(self, step: int) -> Path:
        return self._folder / f"step-{step:08d}"


def _context(step: int, name: str) -> str:
    return f"step {step} {name}"
