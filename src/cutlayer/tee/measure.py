"""Reference values of software: one SHA-384 over the files of a folder.

What a simulated machine claims as its measurement, and what a build of a container can be compared
by. It reads no memory: a process that was changed after it started measures as its files.
"""

import hashlib
import os
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from cutlayer.errors import ConfigError

__all__ = ["PACKAGE_FOLDER", "measure_folder", "measure_package"]

PACKAGE_FOLDER = Path(__file__).resolve().parents[1]
"""Where this installation of cutlayer lies."""

_LABEL = b"cutlayer measurement 1\0"
_SKIPPED_FOLDERS = {"__pycache__"}


@cache
def measure_package() -> bytes:
    """Of this installation of cutlayer as it was when this process first asked; 48 bytes."""
    return measure_folder(PACKAGE_FOLDER)


def measure_folder(folder: Path) -> bytes:
    """SHA-384 over names and contents of all files, in the order of their names; 48 bytes.

    The interpreter's `__pycache__` does not count; dates, owners and modes neither, so that the
    same release measures the same everywhere. Where somebody else can write there, run Python with
    PYTHONPYCACHEPREFIX set elsewhere: what is compiled there runs in the sources' place.

    Raises:
        ConfigError: no folder, an unreadable file, or a folder behind a link.
    """
    digest = hashlib.sha384(_LABEL)
    try:
        for name, path in sorted(_files(folder)):
            content = hashlib.sha384(path.read_bytes()).digest()
            encoded = name.encode("utf-8", "surrogateescape")
            digest.update(len(encoded).to_bytes(4, "big") + encoded + content)
    except OSError as error:
        raise ConfigError(f"cannot measure {error.filename or folder}: {error.strerror}") from error
    return digest.digest()


def _files(folder: Path) -> Iterator[tuple[str, Path]]:
    for parent, folders, names in os.walk(folder, onerror=_fail):
        folders[:] = [name for name in folders if name not in _SKIPPED_FOLDERS]
        for name in folders:
            if (Path(parent) / name).is_symlink():
                raise ConfigError(
                    f"{parent}/{name} is a link to a folder, which would not be measured; copy it"
                )
        for name in names:
            # A compiled file counts here: beside no source it is imported as one is.
            path = Path(parent) / name
            yield path.relative_to(folder).as_posix(), path


def _fail(error: OSError) -> None:
    raise error
