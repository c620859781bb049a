"""Lines that are chained by hashes: how one is made, read and checked.

It opens no file; `log` (one writer) and `shared_log` (several) do.
"""

import base64
import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path

from cutlayer.errors import StorageError

__all__ = [
    "START",
    "Seal",
    "as_object",
    "bad_line",
    "check_links",
    "make_line",
    "parse_line",
]

START = "0" * 64
"""What the first line follows."""
Seal = Callable[[bytes, int], bytes]
"""Encrypts a record, given its line's number."""


def make_line(
    number: int, previous: str, record: Mapping[str, object], seal: Seal | None
) -> tuple[bytes, str]:
    """A line with its end, and its hash.

    Args:
        number: of the line, from 0.
        previous: hash of the line before; `START` for the first.
        record: JSON values with text keys; finite numbers.
        seal: encrypts the record; None leaves it plain.
    """
    entry: dict[str, object] = {"n": number, "prev": previous}
    if seal is None:
        entry["record"] = dict(record)
    else:
        entry["sealed"] = base64.b64encode(seal(_dump(record), number)).decode()
    new_hash = _entry_hash(entry)
    return _dump(entry | {"hash": new_hash}) + b"\n", new_hash


def parse_line(line: bytes, path: Path, number: int) -> dict[str, object]:
    """The JSON object of a line.

    Raises:
        StorageError: it is none.
    """
    try:
        entry = json.loads(line)
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise StorageError(bad_line(path, number, "is not JSON")) from error
    return as_object(entry, path, number)


def check_links(entry: dict[str, object], path: Path, number: int, previous: str) -> None:
    """Refuse a line that is not the next one of its chain.

    Raises:
        StorageError: it has other fields, does not follow the line before, or was changed.
    """
    if {*entry} not in ({"n", "prev", "hash", "record"}, {"n", "prev", "hash", "sealed"}):
        raise StorageError(bad_line(path, number, "has other fields than a log line"))
    if entry["n"] != number or entry["prev"] != previous:
        raise StorageError(bad_line(path, number, "does not follow the line before"))
    unhashed = {key: value for key, value in entry.items() if key != "hash"}
    if entry["hash"] != _entry_hash(unhashed):
        raise StorageError(bad_line(path, number, "was changed after it was written"))


def as_object(value: object, path: Path, number: object) -> dict[str, object]:
    """The value.

    Raises:
        StorageError: it is no JSON object.
    """
    if not isinstance(value, dict):
        raise StorageError(bad_line(path, number, "is not a JSON object"))
    return value


def bad_line(path: Path, number: object, problem: str) -> str:
    """What to say of a line that cannot be trusted."""
    line = number + 1 if isinstance(number, int) else number
    return f"{path} line {line} {problem}; restore the file from a copy, do not edit it"


def _dump(value: Mapping[str, object]) -> bytes:
    return json.dumps(dict(value), sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def _entry_hash(entry: Mapping[str, object]) -> str:
    return hashlib.sha256(_dump(entry)).hexdigest()
