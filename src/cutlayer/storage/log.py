"""An append-only log of JSON lines: a line is on disk before `append` returns.

It does not know what its records mean. Each line is `{"n", "prev", "record" | "sealed", "hash"}`:
its number from 0, the hash of the line before, the record (or, with a vault, its sealed form in
base64) and SHA-256 over the rest of the line. So an edited, removed, repeated or moved line is
found when the log is opened. Lines removed from the END leave a valid shorter log: who must notice
that keeps an `Anchor` elsewhere and passes it to `check`. A hash is no signature: it finds
accidents and careless edits, not an owner who recomputes the chain.
"""

import base64
import binascii
import fcntl
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from cutlayer.errors import StorageError
from cutlayer.storage.chain_lines import (
    START,
    Seal,
    as_object,
    bad_line,
    check_links,
    make_line,
    parse_line,
)
from cutlayer.storage.files import explain_os_errors, sync_folder, write_all, write_atomic
from cutlayer.storage.vault import NoVault, Vault

__all__ = ["Anchor", "DurableLog", "locked_log", "read_log", "reseal_log"]


@dataclass(frozen=True)
class Anchor:
    """How long a log was at a moment, and its last line's hash."""

    num_lines: int
    last_hash: str


class DurableLog:
    """The one writer of a log file; a second one, in this or another process, is refused.

    The file has mode 0600. After a crash the unfinished last line (its append never returned) is
    cut off on open and kept in `NAME.unfinished`.
    """

    def __init__(self, path: Path, vault: Vault | None = None) -> None:
        """Open or create, lock, verify every line.

        Raises:
            StorageError: locked by another writer, a malformed or altered line (named), wrong key.
        """
        self.path = path
        self._vault = NoVault() if vault is None else vault
        self._seal = _sealer(path, self._vault)
        self._is_broken = False
        self._num_lines, self._num_bytes, self._last_hash = 0, 0, START
        with explain_os_errors(f"open log {path}"):
            self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            _lock(self._descriptor, path)
            self._recover()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> "DurableLog":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    @property
    def anchor(self) -> Anchor:
        """The log's state now."""
        return Anchor(self._num_lines, self._last_hash)

    def append(self, record: Mapping[str, object], sync: bool = True) -> None:
        """Add one line; with `sync` it is on disk when this returns.

        Args:
            record: JSON values with text keys; finite numbers.
            sync: False leaves the line to the next `sync()`; a power cut may lose it.

        Raises:
            StorageError: full disk or file error; the line is not in the log.
        """
        self._check_usable()
        line, new_hash = make_line(self._num_lines, self._last_hash, record, self._seal)
        try:
            with explain_os_errors(f"append to {self.path}"):
                write_all(self._descriptor, line)
        except StorageError:
            self._take_back()
            raise
        if sync:
            self._sync_or_break()
        self._num_bytes += len(line)
        self._num_lines += 1
        self._last_hash = new_hash

    def sync(self) -> None:
        """Put every appended line on disk."""
        self._check_usable()
        self._sync_or_break()

    def read(self) -> Iterator[dict[str, object]]:
        """Every record, oldest first, verified again on the way."""
        return read_log(self.path, self._vault)

    def check(self, anchor: Anchor) -> None:
        """Refuse a log that was cut back behind a state that it once had.

        Raises:
            StorageError: fewer lines than the anchor says, or another line in its place.
        """
        last_hash = START
        for number, entry in enumerate(_entries(self.path)):
            if number >= anchor.num_lines:
                break
            last_hash = str(entry["hash"])
        if self._num_lines < anchor.num_lines or last_hash != anchor.last_hash:
            raise StorageError(
                f"{self.path} has {self._num_lines} lines and is not the log that had "
                f"{anchor.num_lines}; put the original file back"
            )

    def close(self) -> None:
        """Release the lock; what was appended with sync stays on disk."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def _recover(self) -> None:
        with explain_os_errors(f"recover log {self.path}"):
            self._num_bytes, rest = _finished_bytes(self.path)
            if rest:
                _keep_aside(self.path, rest)
                os.ftruncate(self._descriptor, self._num_bytes)
            os.lseek(self._descriptor, self._num_bytes, os.SEEK_SET)
            os.fsync(self._descriptor)
            sync_folder(self.path.parent)
        is_key_checked = False
        for entry in _entries(self.path):
            if "sealed" in entry and not is_key_checked:
                # A wrong key must show before work starts, not at the first read of an old line.
                _unseal(entry, self.path, self._vault)
                is_key_checked = True
            self._num_lines += 1
            self._last_hash = str(entry["hash"])

    def _check_usable(self) -> None:
        if self._descriptor < 0 or self._is_broken:
            state = "failed to reach the disk" if self._is_broken else "is closed"
            raise StorageError(f"log {self.path} {state}; open it again")

    def _take_back(self) -> None:
        try:
            os.ftruncate(self._descriptor, self._num_bytes)
            os.lseek(self._descriptor, self._num_bytes, os.SEEK_SET)
        except OSError:
            self._is_broken = True

    def _sync_or_break(self) -> None:
        # After a failed sync the kernel may have dropped the pages: nothing may build on them.
        try:
            with explain_os_errors(f"sync log {self.path}"):
                os.fdatasync(self._descriptor)
        except StorageError:
            self._take_back()
            self._is_broken = True
            raise


def read_log(path: Path, vault: Vault | None = None) -> Iterator[dict[str, object]]:
    """Records of a log, verified, without the writer's lock; an unfinished last line is left out.

    Raises:
        StorageError: unreadable file, a malformed or altered line (named), wrong key.
    """
    vault = NoVault() if vault is None else vault
    for entry in _entries(path):
        if "record" in entry:
            # Also with a key: a log may have begun before encryption was switched on.
            yield as_object(entry["record"], path, entry["n"])
        else:
            yield _unseal(entry, path, vault)


def reseal_log(path: Path, old: Vault, new: Vault) -> None:
    """Write a log again under another key, durable when this returns; for its one writer.

    Raises:
        StorageError: as for `read_log`, or the disk is full; the old file stays then.
    """

    def lines() -> Iterator[bytes]:
        last_hash = START
        for number, record in enumerate(read_log(path, old)):
            line, last_hash = make_line(number, last_hash, record, _sealer(path, new))
            yield line

    write_atomic(path, lines())


@contextmanager
def locked_log(path: Path) -> Iterator[None]:
    """Keep every writer out of a log, whatever its content, without opening it as one.

    Raises:
        StorageError: some process writes it, or the file cannot be opened.
    """
    with explain_os_errors(f"open log {path}"):
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        _lock(descriptor, path)
        yield
    finally:
        os.close(descriptor)


def _lock(descriptor: int, path: Path) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise StorageError(f"{path} is used by another process; stop it first") from error


def _sealer(path: Path, vault: Vault) -> Seal | None:
    if isinstance(vault, NoVault):
        return None
    return lambda data, number: vault.seal(data, _context(path, number))


def _entries(path: Path) -> Iterator[dict[str, object]]:
    previous = START
    with explain_os_errors(f"read log {path}"), path.open("rb") as file:
        for number, line in enumerate(file):
            if _is_unfinished(line) and not file.peek(1):
                return
            entry = parse_line(line, path, number)
            check_links(entry, path, number, previous)
            previous = str(entry["hash"])
            yield entry


def _unseal(entry: dict[str, object], path: Path, vault: Vault) -> dict[str, object]:
    number = entry["n"]
    assert isinstance(number, int)
    try:
        sealed = base64.b64decode(str(entry["sealed"]), validate=True)
    except binascii.Error as error:
        raise StorageError(bad_line(path, number, "is not base64")) from error
    return parse_line(vault.open(sealed, _context(path, number)), path, number)


def _context(path: Path, number: int) -> str:
    return f"{path.name} line {number + 1}"


def _is_unfinished(line: bytes) -> bool:
    # A crash can leave a last line without its end, or with pages that never reached the disk.
    return not line.endswith(b"\n") or b"\0" in line


def _finished_bytes(path: Path) -> tuple[int, bytes]:
    """Length of the finished lines, and the unfinished last line (empty if there is none)."""
    num_bytes, rest = 0, b""
    with path.open("rb") as file:
        for line in file:
            if rest:
                # Only a LAST line may be unfinished; `_entries` will name this one.
                return num_bytes + len(rest) + len(line) + len(file.read()), b""
            if _is_unfinished(line):
                rest = line
            else:
                num_bytes += len(line)
    return num_bytes, rest


def _keep_aside(path: Path, rest: bytes) -> None:
    aside = path.with_name(f"{path.name}.unfinished")
    descriptor = os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
    try:
        write_all(descriptor, rest + b"\n")
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
