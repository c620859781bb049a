"""The store's sqlite file: one writer, readers beside it, errors that say what to do.

It does not know the tables' meaning (`store`).
"""

import fcntl
import os
import sqlite3
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from cutlayer.errors import StorageError
from cutlayer.federation.store_rows import ADDED, SCHEMA
from cutlayer.storage.files import explain_os_errors

__all__ = ["Database", "Row", "Value", "WriterLock"]

_VERSION = 1
Value = str | int | float | None
Row = tuple[Value, ...]


class WriterLock:
    """Held by the one process that writes a folder; gone with the process."""

    def __init__(self, folder: Path) -> None:
        """Take it.

        Raises:
            StorageError: another process has it; the message names it.
        """
        path = folder / "writer.lock"
        with explain_os_errors(f"lock {path}"):
            self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            holder = os.read(self._descriptor, 32).decode(errors="replace").strip() or "another"
            os.close(self._descriptor)
            raise StorageError(
                f"{folder} is written by process {holder}; stop it first, one server at a time"
            ) from error
        os.ftruncate(self._descriptor, 0)
        os.pwrite(self._descriptor, f"{os.getpid()}\n".encode(), 0)

    def release(self) -> None:
        """Give it back."""
        os.close(self._descriptor)


class Database:
    """One connection, usable from several threads."""

    def __init__(self, path: Path, is_reader: bool) -> None:
        """Open; a writer creates the tables, every change is on disk when it returns.

        Raises:
            StorageError: missing (for a reader), damaged, or of another version.
        """
        self._path = path
        self._lock = threading.RLock()
        if is_reader and not path.exists():
            raise StorageError(f"{path.parent} holds no federation; check the folder")
        with explain_os_errors(f"open {path}"):
            os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
        with self._explained():
            self._connection = sqlite3.connect(
                path, timeout=30, isolation_level=None, check_same_thread=False
            )
        try:
            with self._explained():
                self._prepare(is_reader)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Close the connection."""
        self._connection.close()

    def rows(self, query: str, values: Sequence[Value] = ()) -> list[Row]:
        """All rows of a SELECT."""
        with self._lock, self._explained():
            return self._connection.execute(query, values).fetchall()

    @contextmanager
    def transaction(self) -> Iterator[sqlite3.Cursor]:
        """All changes of the block, or none; durable when the block has ended."""
        with self._lock, self._explained():
            cursor = self._connection.cursor()
            cursor.execute("BEGIN IMMEDIATE")
            try:
                yield cursor
                cursor.execute("COMMIT")
            except BaseException:
                if self._connection.in_transaction:
                    cursor.execute("ROLLBACK")
                raise

    def _prepare(self, is_reader: bool) -> None:
        connection = self._connection
        if is_reader:
            # A connection that sqlite opens read-only cannot share a WAL whose writer is gone.
            connection.execute("PRAGMA query_only = ON")
        else:
            connection.execute("PRAGMA journal_mode = WAL")
            connection.execute("PRAGMA synchronous = FULL")
        (version,) = connection.execute("PRAGMA user_version").fetchone()
        if version == 0 and not is_reader:
            connection.executescript(f"BEGIN; {SCHEMA} PRAGMA user_version = {_VERSION}; COMMIT;")
        elif version != _VERSION:
            raise StorageError(
                f"{self._path} has format {version}, this version of cutlayer reads {_VERSION}; "
                "use the version that wrote it"
            )
        if not is_reader:
            connection.executescript(ADDED)

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            raise StorageError(
                f"cannot use {self._path}: {error}; free space or restore the folder from a copy, "
                "rounds that were finished are kept"
            ) from error
