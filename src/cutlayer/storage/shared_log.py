"""A chained log that several processes append to, one at a time, each having read all the others.

Its lines are those of `log`; it does not know what they mean. It keeps no file open: whoever wants
to write takes the lock, reads what was added, decides, appends and lets go.
"""

import fcntl
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from cutlayer.errors import StorageError
from cutlayer.storage.chain_lines import (
    START,
    as_object,
    bad_line,
    check_links,
    make_line,
    parse_line,
)
from cutlayer.storage.files import explain_os_errors, sync_folder, write_all
from cutlayer.storage.log import Anchor

__all__ = ["SharedLog"]

_POLL_S = 0.005


class SharedLog:
    """One reader and writer of many. Not safe to use from several threads at once."""

    def __init__(self, path: Path, timeout_s: float = 30.0) -> None:
        """
        Args:
            path: the file; made with mode 0600 when something is appended.
            timeout_s: how long to wait for another writer.
        """
        self.path, self._timeout_s = path, timeout_s
        self._num_bytes, self._num_lines, self._last_hash = 0, 0, START
        self._descriptor = -1

    @property
    def anchor(self) -> Anchor:
        """The log's state when it was last read or written here."""
        return Anchor(self._num_lines, self._last_hash)

    @contextmanager
    def locked(self) -> Iterator[list[dict[str, object]]]:
        """Keep the others out; gives the records that were added since the last time.

        Raises:
            StorageError: another process holds it too long, the file was cut back, replaced or
                edited, or cannot be read.
        """
        with explain_os_errors(f"open log {self.path}"):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC
            self._descriptor = os.open(self.path, flags, 0o600)
        try:
            self._lock()
            with explain_os_errors(f"read log {self.path}"):
                added = list(self._added())
            yield added
        finally:
            os.close(self._descriptor)
            self._descriptor = -1

    def append(self, record: Mapping[str, object]) -> Anchor:
        """Add one line, on disk when this returns; only within `locked`.

        Raises:
            StorageError: full disk or file error; the line is not in the log.
        """
        assert self._descriptor >= 0, "append outside of locked"
        line, new_hash = make_line(self._num_lines, self._last_hash, record, None)
        try:
            with explain_os_errors(f"append to {self.path}"):
                os.lseek(self._descriptor, self._num_bytes, os.SEEK_SET)
                write_all(self._descriptor, line)
                os.fdatasync(self._descriptor)
                if not self._num_lines:
                    sync_folder(self.path.parent)
        except StorageError:
            # What is left of it is an unfinished line, which the next reader cuts off.
            with explain_os_errors(f"append to {self.path}"):
                os.ftruncate(self._descriptor, self._num_bytes)
            raise
        self._num_bytes += len(line)
        self._num_lines += 1
        self._last_hash = new_hash
        return self.anchor

    def check(self, anchor: Anchor) -> None:
        """Refuse a log that was cut back behind a state that it once had; within `locked`.

        Raises:
            StorageError: fewer lines than the anchor says, or another line in its place.
        """
        last_hash = START
        for number, (entry, _) in enumerate(self._entries(0, 0, START)):
            if number >= anchor.num_lines:
                break
            last_hash = str(entry["hash"])
        if self._num_lines < anchor.num_lines or last_hash != anchor.last_hash:
            raise StorageError(
                f"{self.path} has {self._num_lines} lines and is not the log that had "
                f"{anchor.num_lines}: it was removed, cut back or replaced; put the original back"
            )

    def _added(self) -> Iterator[dict[str, object]]:
        size = os.fstat(self._descriptor).st_size
        if size < self._num_bytes:
            raise StorageError(
                f"{self.path} was cut back or replaced while it was in use; put the original back"
            )
        for entry, length in self._entries(self._num_bytes, self._num_lines, self._last_hash):
            if "record" not in entry:
                raise StorageError(bad_line(self.path, entry["n"], "is encrypted"))
            self._num_bytes += length
            self._num_lines += 1
            self._last_hash = str(entry["hash"])
            yield as_object(entry["record"], self.path, entry["n"])
        if size > self._num_bytes:
            # A writer died while it wrote; its append never returned.
            os.ftruncate(self._descriptor, self._num_bytes)

    def _entries(
        self, offset: int, number: int, previous: str
    ) -> Iterator[tuple[dict[str, object], int]]:
        with open(self._descriptor, "rb", closefd=False) as file:
            file.seek(offset)
            for count, line in enumerate(file, number):
                if not line.endswith(b"\n") and not file.peek(1):
                    return
                entry = parse_line(line, self.path, count)
                check_links(entry, self.path, count, previous)
                previous = str(entry["hash"])
                yield entry, len(line)

    def _lock(self) -> None:
        until_s = time.monotonic() + self._timeout_s
        while True:
            try:
                fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except BlockingIOError as error:
                if time.monotonic() > until_s:
                    raise StorageError(
                        f"{self.path} is locked by another process for {self._timeout_s:g} s; "
                        "stop it first"
                    ) from error
                time.sleep(_POLL_S)
