"""Results of runs in a folder: one JSON file each, whole or not there. It runs nothing.

    RUN_ID.json      a result, also of a run that failed
    logs/RUN_ID.log  what a run that failed said
    work/RUN_ID/     what a run that is under way needs; it holds texts, and ends with it

Two specs that are equal are one run, whatever their files are called.
"""

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec

from cutlayer.errors import ConfigError, StorageError
from cutlayer.storage.files import (
    explain_os_errors,
    private_folder,
    remove_leftovers,
    write_atomic,
)
from cutlayer.suite.result import RunResult
from cutlayer.suite.spec import RunSpec

__all__ = ["Store"]

_LOCK, _LOGS, _WORK = ".lock", "logs", "work"
_MODE = 0o644
"""Numbers alone: anybody may read them."""


class Store:
    """Results of one folder, read when it is opened."""

    def __init__(self, folder: Path) -> None:
        """Read every result.

        Args:
            folder: need not exist; nothing is written until `put` or `locked`.

        Raises:
            StorageError: a file is damaged, of another version, or a second one of the same run.
        """
        self.folder = folder
        self._paths: dict[RunSpec, Path] = {}
        self._results: dict[RunSpec, RunResult] = {}
        self._read()

    @classmethod
    def existing(cls, folder: Path) -> "Store":
        """The store of a folder that must hold results.

        Raises:
            ConfigError: there is no folder, or no result in it.
            StorageError: as for `Store`.
        """
        store = cls(folder)
        if not store.all():
            raise ConfigError(
                f"{folder} holds no results; name the folder that cutlayer eval suite wrote"
            )
        return store

    def all(self) -> list[RunResult]:
        """Every result, failed runs too, by run id."""
        return sorted(self._results.values(), key=lambda result: result.spec.run_id)

    def get(self, spec: RunSpec) -> RunResult | None:
        """The result of a run, None before its first end."""
        return self._results.get(spec)

    def is_done(self, spec: RunSpec) -> bool:
        """Whether a run has ended well; one that failed is tried again."""
        result = self.get(spec)
        return result is not None and result.error is None

    def put(self, result: RunResult) -> None:
        """Keep a result in place of an earlier one of the same run, whose log goes if this is well.

        Raises:
            StorageError: it cannot be written; the earlier one is untouched.
        """
        path = self.folder / f"{result.spec.run_id}.json"
        with explain_os_errors(f"create {self.folder}"):
            self.folder.mkdir(parents=True, exist_ok=True)
        write_atomic(path, _encoded(result), _MODE)
        earlier = self._paths.get(result.spec)
        if earlier is not None and earlier != path:
            with explain_os_errors(f"remove {earlier}"):
                earlier.unlink()
        self._paths[result.spec], self._results[result.spec] = path, result
        if result.error is None:
            log = self.folder / _LOGS / f"{result.spec.run_id}.log"
            with explain_os_errors(f"remove {log}"):
                log.unlink(missing_ok=True)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """One suite at a time in a folder, read again; what a killed one left is removed.

        Raises:
            StorageError: another suite runs here, the folder cannot be written, or as for `Store`.
        """
        with explain_os_errors(f"use the store {self.folder}"):
            self.folder.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(self.folder / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        with os.fdopen(descriptor) as file:
            _take(file.fileno(), self.folder)
            # Another suite may have ended since this store was opened.
            self._read()
            self._clean()
            try:
                yield
            finally:
                self._clean()

    def work_folder(self, spec: RunSpec) -> Path:
        """A new private folder for a run that begins."""
        private_folder(self.folder / _WORK)
        return private_folder(self.folder / _WORK / spec.run_id)

    def log_file(self, spec: RunSpec) -> Path:
        """Where the words of a failed run go; its folder is made."""
        return private_folder(self.folder / _LOGS) / f"{spec.run_id}.log"

    def _clean(self) -> None:
        remove_leftovers(self.folder)
        with explain_os_errors(f"clean {self.folder / _WORK}"):
            if (self.folder / _WORK).exists():
                shutil.rmtree(self.folder / _WORK)

    def _read(self) -> None:
        if self.folder.exists() and not self.folder.is_dir():
            raise StorageError(f"{self.folder} is a file; name the folder of a store")
        self._paths, self._results = {}, {}
        for path in sorted(self.folder.glob("*.json")):
            result = _decoded(path)
            first = self._paths.setdefault(result.spec, path)
            if first != path:
                raise StorageError(f"{first} and {path} are of the same run; remove one of them")
            self._results[result.spec] = result


def _take(descriptor: int, folder: Path) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise StorageError(
            f"another suite is writing to {folder}; wait for it, or choose another --out"
        ) from error


def _encoded(result: RunResult) -> bytes:
    """One field a line, so that a difference of two versions can be read."""
    lines = [
        msgspec.json.encode(name) + b":" + msgspec.json.encode(value, order="deterministic")
        for name, value in msgspec.to_builtins(result).items()
    ]
    return b"{\n" + b",\n".join(lines) + b"\n}\n"


def _decoded(path: Path) -> RunResult:
    with explain_os_errors(f"read {path}"):
        data = path.read_bytes()
    try:
        return msgspec.json.decode(data, type=RunResult)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise StorageError(
            f"{path} is not a result of this version of cutlayer ({error}); "
            "remove it and run the suite again"
        ) from error
