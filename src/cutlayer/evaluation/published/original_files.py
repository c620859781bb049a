"""Files as a task's authors pass them on: found by name, read with errors that name the place.

It knows no task: what a file's columns mean stands in the tasks' own modules.
"""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from cutlayer.data.sources import Record, read_records
from cutlayer.errors import DataError

__all__ = ["file_of", "json_file", "json_lines", "records_of", "text_file", "texts_of"]

_REMEDY = "if the file is truncated, fetch it again"


def file_of(folder: Path, names: Sequence[str]) -> Path:
    """The first of some files that is there.

    Args:
        folder: where to look, or one of the files itself.
        names: file names, or paths within the folder, the preferred one first.

    Raises:
        DataError: none is there; the message lists what was looked for.
    """
    if folder.is_file() and folder.name in {Path(name).name for name in names}:
        return folder
    found = next((folder / name for name in names if (folder / name).is_file()), None)
    if found is None:
        raise DataError(_nothing_found(folder, names))
    return found


def json_file(path: Path) -> object:
    """The value of a whole JSON file.

    Raises:
        DataError: unreadable, empty, not UTF-8 or no JSON; the message names line or byte.
    """
    try:
        value: object = json.loads(text_file(path))
    except json.JSONDecodeError as error:
        # Not `error.doc`: the message must not carry the file's text.
        where = f"{path}:{error.lineno} column {error.colno}"
        raise DataError(f"{where}: malformed JSON: {error.msg}; {_REMEDY}") from None
    except (RecursionError, ValueError) as error:
        raise DataError(f"{path}: JSON nested too deep or with too long a number") from error
    return value


def json_lines(path: Path) -> Iterator[Record]:
    """The objects of a file with one JSON object per line.

    Raises:
        DataError: unreadable, empty or malformed; the message names the line.
    """
    try:
        yield from read_records(path, "jsonl")
    except DataError as error:
        raise DataError(f"{error}; {_REMEDY}") from error


def text_file(path: Path) -> str:
    """The text of a UTF-8 file, line ends as `\\n`, without a byte order mark.

    Raises:
        DataError: missing, unreadable, empty or not UTF-8.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}; check the path") from error
    except UnicodeDecodeError as error:
        # Not the codec's message: it may quote the file's bytes.
        raise DataError(f"{path}: byte {error.start} is not UTF-8; {_REMEDY}") from None
    if not text.strip():
        raise DataError(f"{path} is empty; fetch it again")
    return text


def records_of(values: object, where: str) -> list[Record]:
    """The objects of a list within a JSON file.

    Args:
        values: what should be a list of objects.
        where: file and path of the list, for messages.

    Raises:
        DataError: no list, or a member that is no object.
    """
    records = []
    for number, value in enumerate(_listed(values, where)):
        if not isinstance(value, dict):
            raise DataError(f"{where}[{number}] is no object; fetch the file again")
        records.append(Record(value, f"{where}[{number}]"))
    return records


def texts_of(values: object, where: str) -> list[str]:
    """The texts of a list within a JSON file.

    Args:
        values: what should be a list of texts.
        where: file and path of the list, for messages.

    Raises:
        DataError: no list, or a member that is no text.
    """
    named = {str(number): value for number, value in enumerate(_listed(values, where))}
    record = Record(named, where)
    return [record.text(name) for name in named]


def _listed(values: object, where: str) -> list[object]:
    if not isinstance(values, list):
        raise DataError(f"{where} is no list; fetch the file again")
    return values


def _nothing_found(folder: Path, names: Sequence[str]) -> str:
    looked_for = " or ".join(names)
    if folder.is_file():
        return f"{folder} is not {looked_for}; name the file so, or give the folder that holds it"
    if not folder.is_dir():
        return f"{folder} does not exist; give the folder that holds {looked_for}"
    return f"{folder} holds no {looked_for}; fetch the original files and give their folder"
