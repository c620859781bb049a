"""Takes chosen files out of a zip or tar archive into a folder, and nothing else anywhere else.

It does not download and it trusts no name, kind or size that the archive states.
"""

import io
import lzma
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from cutlayer.errors import StorageError

__all__ = ["Selection", "extract"]

_CHUNK_BYTES = 1 << 20
_BROKEN = (
    zipfile.BadZipFile,
    tarfile.TarError,
    zlib.error,
    lzma.LZMAError,
    EOFError,
    RuntimeError,
    ValueError,
)


@dataclass(frozen=True, kw_only=True)
class Selection:
    """Which members of an archive are wanted."""

    folder: str
    """Members below this folder; their paths are kept relative to it."""
    suffix: str
    """Members whose name ends so."""
    max_bytes: int
    """Refuse to unpack more than this in all."""
    inner_archive: str | None = None
    """Member that is itself the archive to look in."""
    files: tuple[str, ...] = ()
    """Paths below the folder: these alone, and each of them; empty takes all with the suffix."""


def extract(archive: Path, selection: Selection, target: Path) -> None:
    """Write the selected members below `target`.

    Raises:
        StorageError: not an archive, a member that would land outside, too many bytes, or none.
    """
    with _explained(archive), archive.open("rb") as file:
        if selection.inner_archive is None:
            found = _extract(file, selection, target)
        else:
            inner = _read_member(file, selection.inner_archive, selection.max_bytes)
            found = _extract(io.BytesIO(inner), selection, target)
    missing = [name for name in selection.files if PurePosixPath(name) not in found]
    if missing or not found:
        wanted = ", ".join(missing) or f"*{selection.suffix}"
        raise StorageError(f"{archive} holds no {wanted} in {selection.folder}")


@contextmanager
def _explained(archive: Path) -> Iterator[None]:
    try:
        yield
    except _BROKEN as error:
        raise StorageError(f"{archive} is damaged: {error}; fetch it again") from error


def _extract(file: BinaryIO, selection: Selection, target: Path) -> set[PurePosixPath]:
    found: set[PurePosixPath] = set()
    budget = selection.max_bytes
    for name, content in _members(file):
        path = _wanted(name, selection)
        if path is not None:
            budget -= _copy(content, target / path, budget, name)
            found.add(path)
    return found


def _wanted(name: str, selection: Selection) -> PurePosixPath | None:
    """Where the member goes below the target, or None where it is not wanted."""
    path = PurePosixPath(name)
    if not (path.is_relative_to(selection.folder) and name.endswith(selection.suffix)):
        return None
    inner = path.relative_to(selection.folder)
    if inner.is_absolute() or ".." in inner.parts or "\\" in name or not inner.parts:
        raise StorageError(f"archive member {name!r} would be written outside its folder")
    return inner if not selection.files or inner.as_posix() in selection.files else None


def _copy(content: BinaryIO, path: Path, budget: int, name: str) -> int:
    """Copy a member, counting real bytes: a header may state fewer."""
    path.parent.mkdir(parents=True, exist_ok=True)
    num_bytes = 0
    with path.open("xb") as file:
        while chunk := content.read(_CHUNK_BYTES):
            num_bytes += len(chunk)
            _check_budget(num_bytes, budget, name)
            file.write(chunk)
    return num_bytes


def _read_member(file: BinaryIO, wanted: str, max_bytes: int) -> bytes:
    for name, content in _members(file):
        if name == wanted:
            data = content.read(max_bytes + 1)
            _check_budget(len(data), max_bytes, name)
            return data
    raise StorageError(f"the archive holds no {wanted}")


def _check_budget(num_bytes: int, budget: int, name: str) -> None:
    if num_bytes > budget:
        raise StorageError(f"archive member {name!r} is larger than the {budget} bytes allowed")


def _members(file: BinaryIO) -> Iterator[tuple[str, BinaryIO]]:
    """Name and content of every plain file; links and devices are passed over."""
    if zipfile.is_zipfile(file):
        yield from _zip_members(file)
        return
    file.seek(0)
    with tarfile.open(fileobj=file) as tar:
        for member in tar:
            content = tar.extractfile(member) if member.isfile() else None
            if content is not None:
                with content:
                    yield member.name, content  # type: ignore[misc]


def _zip_members(file: BinaryIO) -> Iterator[tuple[str, BinaryIO]]:
    with zipfile.ZipFile(file) as archive:
        for info in archive.infolist():
            if not info.is_dir():
                with archive.open(info) as content:
                    yield info.filename, content  # type: ignore[misc]
