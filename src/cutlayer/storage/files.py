"""Files that a crash or a full disk cannot half-write, and files that only their owner reads.

It does not encrypt (`vault`), append (`log`) nor delete runs (`purge`). One writer per target:
two processes that write the same target at once are kept apart by the lock of a run's log.
"""

import ctypes
import errno
import os
import secrets
import shutil
import stat
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from cutlayer.errors import StorageError

__all__ = [
    "explain_os_errors",
    "private_folder",
    "read_private",
    "remove_leftovers",
    "replace_folder",
    "settle_folder",
    "sync_folder",
    "write_all",
    "write_atomic",
]

_TEMPORARY = ".cutlayer-tmp"
_COMPLETE = ".cutlayer-new"
_OLD = ".cutlayer-old"
_NO_SPACE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_FORBIDDEN = {errno.EACCES, errno.EPERM, errno.EROFS}
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2


def write_atomic(path: Path, data: bytes | Iterable[bytes], mode: int = 0o600) -> None:
    """Write a file so that a crash leaves the old content or the new, on disk when this returns.

    Args:
        path: the file; its folder must exist.
        data: the whole content, or chunks of it in order.
        mode: permission bits of the file, whatever the umask.

    Raises:
        StorageError: full disk, no permission; the old file is untouched, no temporary is left.
    """
    temporary = _sibling(path, f"-{secrets.token_hex(4)}{_TEMPORARY}")
    with explain_os_errors(f"write {path}"), _removed_on_failure(temporary):
        _write_new(temporary, [data] if isinstance(data, bytes) else data, mode)
        os.replace(temporary, path)
        sync_folder(path.parent)


def replace_folder(target: Path, fill: Callable[[Path], None]) -> None:
    """Replace a whole folder so that a crash leaves the old one or the new one.

    Args:
        target: the folder, existing or not; the new one has mode 0700.
        fill: writes the new content into an empty folder. It may use plain writes: every file is
            synced before the exchange.

    Raises:
        StorageError: full disk, no permission; the old folder is untouched.
        Exception: whatever `fill` raises, with the old folder untouched.
    """
    settle_folder(target)
    temporary = _sibling(target, _TEMPORARY)
    with explain_os_errors(f"write folder {target}"), _removed_on_failure(temporary):
        _remove_tree(temporary)
        os.mkdir(temporary, 0o700)
        fill(temporary)
        _sync_tree(temporary)
        _take_place(temporary, target)


def settle_folder(target: Path) -> None:
    """Finish or undo an exchange that a crash interrupted; call before reading `target`.

    It has work to do only on file systems without an atomic exchange of two folders.
    """
    complete, old = _sibling(target, _COMPLETE), _sibling(target, _OLD)
    with explain_os_errors(f"settle folder {target}"):
        if complete.exists():
            _take_place_in_steps(complete, target)
        elif old.exists() and not target.exists():
            os.rename(old, target)
            sync_folder(target.parent)
        _remove_tree(old)


def remove_leftovers(folder: Path) -> int:
    """Delete temporary files that killed writers left in `folder`; returns how many.

    Only for the folder's one writer, before it writes.
    """
    with explain_os_errors(f"clean {folder}"):
        leftovers = [p for p in folder.iterdir() if p.name.endswith(_TEMPORARY)]
        for path in leftovers:
            _remove_tree(path)
    return len(leftovers)


def private_folder(path: Path) -> Path:
    """Create a folder with mode 0700, or check that the existing one is closed to others.

    Raises:
        StorageError: it is not a folder, or its group or others may enter it.
    """
    with explain_os_errors(f"create folder {path}"):
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.mkdir(mode=0o700, exist_ok=True)
            sync_folder(path.parent)
        mode = path.stat().st_mode
    if not stat.S_ISDIR(mode):
        raise StorageError(f"{path} is a file where a private folder is needed; choose another")
    _refuse_open_mode(path, mode, "700")
    return path


def read_private(path: Path) -> bytes:
    """Read a file that nobody but its owner may read.

    Raises:
        StorageError: it is missing, not a plain file, or its mode is wider than 0600.
    """
    with explain_os_errors(f"read {path}"):
        # Non-blocking, so that a named pipe in the file's place cannot hang us.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        with os.fdopen(descriptor, "rb") as file:
            mode = os.fstat(descriptor).st_mode
            if not stat.S_ISREG(mode):
                raise StorageError(f"{path} is not a plain file; point to the file itself")
            _refuse_open_mode(path, mode, "600")
            return file.read()


@contextmanager
def explain_os_errors(action: str) -> Iterator[None]:
    """Turn an `OSError` of the block into a StorageError that says what to do."""
    try:
        yield
    except OSError as error:
        raise StorageError(f"cannot {action}: {_reason(error)}") from error


def sync_folder(path: Path) -> None:
    """Make renames and new names in `path` durable."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_all(descriptor: int, data: bytes) -> None:
    """Write every byte; a file limit or a full disk may take a part first and fail then."""
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]


def _reason(error: OSError) -> str:
    what = error.strerror or str(error)
    where = f" ({error.filename})" if error.filename else ""
    if error.errno in _NO_SPACE:
        return f"{what}{where}; free space and start again, nothing saved earlier is lost"
    if error.errno in _FORBIDDEN:
        return f"{what}{where}; check owner and mode of the file and its folder"
    if error.errno == errno.ENOENT:
        return f"{what}{where}; check the path"
    return f"{what}{where}"


def _refuse_open_mode(path: Path, mode: int, wanted: str) -> None:
    if mode & 0o077:
        bits = stat.S_IMODE(mode)
        raise StorageError(f"{path} has mode {bits:04o}, others may use it: chmod {wanted} {path}")


def _sibling(path: Path, suffix: str) -> Path:
    return path.parent / f".{path.name}{suffix}"


def _write_new(path: Path, chunks: Iterable[bytes], mode: int) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        os.fchmod(descriptor, mode)
        for chunk in chunks:
            write_all(descriptor, chunk)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def _removed_on_failure(temporary: Path) -> Iterator[None]:
    try:
        yield
    except BaseException:
        # The reason for the failure matters more than a leftover that the next writer removes.
        with suppress(OSError):
            _remove_tree(temporary)
        raise


def _remove_tree(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _sync_tree(folder: Path) -> None:
    for parent, _, names in os.walk(folder, topdown=False):
        for name in names:
            descriptor = os.open(os.path.join(parent, name), os.O_RDONLY | os.O_CLOEXEC)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        sync_folder(Path(parent))


def _take_place(temporary: Path, target: Path) -> None:
    if not target.exists():
        os.rename(temporary, target)
    elif _exchange(temporary, target):
        sync_folder(target.parent)
        _remove_tree(temporary)
    else:
        complete = _sibling(target, _COMPLETE)
        os.rename(temporary, complete)
        _take_place_in_steps(complete, target)
    sync_folder(target.parent)


def _take_place_in_steps(complete: Path, target: Path) -> None:
    # `complete` is on disk as a whole, so a crash after this line is finished by settle_folder.
    sync_folder(target.parent)
    old = _sibling(target, _OLD)
    if target.exists():
        _remove_tree(old)
        os.rename(target, old)
    os.rename(complete, target)
    sync_folder(target.parent)
    _remove_tree(old)


def _exchange(first: Path, second: Path) -> bool:
    """Swap two names atomically; False where the system or the file system cannot."""
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is None:
        return False
    result = rename(_AT_FDCWD, os.fsencode(first), _AT_FDCWD, os.fsencode(second), _RENAME_EXCHANGE)
    code = ctypes.get_errno()
    if result != 0 and code not in {errno.EINVAL, errno.ENOSYS, errno.EXDEV, errno.ENOTSUP}:
        raise OSError(code, os.strerror(code), str(second))
    return bool(result == 0)
