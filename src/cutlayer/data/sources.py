"""Files of the owner's data as a stream of records, one reader per kind of file.

It does not know prompts, tokens or labels, and it copies nothing: no reader writes a cache.
"""

import csv
import difflib
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from cutlayer.errors import DataError

__all__ = ["Reader", "Record", "read_records", "source", "source_kinds"]

Reader = Callable[[Path, str], Iterator["Record"]]
"""Reads the records of one file or folder; the second argument names the wanted split."""

_SPLITS = ("train", "validation", "test")
_BYTE_ORDER_MARK = "\ufeff"


@dataclass(frozen=True)
class Record:
    """One record as the file has it, and where it stands."""

    fields: Mapping[str, object] = field(repr=False)
    """Value per column."""
    where: str
    """`file:line`, or file and row number where the format has no lines."""

    def text(self, name: str) -> str:
        """The text of one column.

        Raises:
            DataError: no such column, not text, or text that is not valid Unicode.
        """
        value = self.value(name)
        if not isinstance(value, str):
            raise DataError(
                f"{self.where}: column {name!r} is {_type_name(value)}, expected text; "
                "convert the column to text"
            )
        self.check_unicode(value, name)
        return value

    def value(self, name: str) -> object:
        """The value of one column, whatever its type; a DataError names the known columns."""
        if name in self.fields:
            return self.fields[name]
        near = difflib.get_close_matches(name, self.fields, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        known = ", ".join(sorted(map(repr, self.fields)))
        raise DataError(f"{self.where}: no column {name!r}; {hint}the columns are {known}")

    def check_unicode(self, text: str, name: str) -> None:
        """Refuse half of a surrogate pair: JSON may spell one, a tokenizer cannot read it."""
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise DataError(
                f"{self.where}: column {name!r} holds half a surrogate pair at character "
                f"{error.start}; write the file again as valid UTF-8"
            ) from error


_READERS: dict[str, Reader] = {}
_KIND_BY_SUFFIX: dict[str, str] = {}


def source(kind: str, *suffixes: str) -> Callable[[Reader], Reader]:
    """Register a reader under a kind's name and the file suffixes that mean it."""

    def register(reader: Reader) -> Reader:
        assert kind not in _READERS, f"two readers for {kind}"
        _READERS[kind] = reader
        _KIND_BY_SUFFIX.update(dict.fromkeys(suffixes, kind))
        return reader

    return register


def source_kinds() -> list[str]:
    """The names of all registered kinds, sorted."""
    return sorted(_READERS)


def read_records(path: Path, kind: str | None = None, split: str = "train") -> Iterator[Record]:
    """Stream the records of a file or folder.

    Args:
        path: the file, or a folder written by `datasets` or holding data files.
        kind: the kind of source; None means by suffix.
        split: which split of a folder that holds several.

    Raises:
        DataError: missing, empty, of unknown kind, or malformed; the message names the line.
    """
    if not path.exists():
        raise DataError(f"{path} does not exist; check the path of the data")
    reader = _READERS.get(kind or _kind_of(path))
    if reader is None:
        known = ", ".join(source_kinds())
        raise DataError(f"{path}: unknown kind of data {kind!r}; choose one of {known}")
    return _never_empty(path, reader, split)


@source("jsonl", ".jsonl", ".ndjson")
def _read_jsonl(path: Path, split: str) -> Iterator[Record]:
    for number, line in _lines(path):
        if line.strip():
            where = f"{path}:{number}"
            yield Record(_json_object(line, where), where)


@source("csv", ".csv")
def _read_csv(path: Path, split: str) -> Iterator[Record]:
    yield from _read_separated(path, ",")


@source("tsv", ".tsv")
def _read_tsv(path: Path, split: str) -> Iterator[Record]:
    yield from _read_separated(path, "\t")


@source("parquet", ".parquet")
def _read_parquet(path: Path, split: str) -> Iterator[Record]:
    # Here and below: heavy imports wait until such a file is really read.
    import pyarrow
    import pyarrow.parquet

    number = 0
    with _foreign_errors(path, "Parquet", (pyarrow.ArrowException, OSError)):
        for batch in pyarrow.parquet.ParquetFile(path).iter_batches(batch_size=1024):
            for fields in batch.to_pylist():
                number += 1
                yield Record(fields, f"{path} row {number}")


@source("datasets")
def _read_datasets(path: Path, split: str) -> Iterator[Record]:
    if not _is_saved_dataset(path):
        yield from _read_folder(path, split)
        return
    import datasets

    with _foreign_errors(path, "datasets folder", (ValueError, OSError, KeyError)):
        data = datasets.load_from_disk(str(path))
        if isinstance(data, datasets.DatasetDict):
            data = data[_known_split(path, split, list(data))]
        for number, fields in enumerate(data, start=1):
            yield Record(fields, f"{path} row {number}")


def _read_folder(path: Path, split: str) -> Iterator[Record]:
    """Read plain data files in a folder, found by the split in their name, without any cache."""
    files = sorted(p for p in path.rglob("*") if p.is_file() and p.suffix in _KIND_BY_SUFFIX)
    if not files:
        suffixes = ", ".join(sorted(_KIND_BY_SUFFIX))
        raise DataError(f"{path} holds no saved dataset and no data file ({suffixes})")
    wanted = [file for file in files if _names(file.relative_to(path), split)]
    names_any = any(_names(file.relative_to(path), known) for file in files for known in _SPLITS)
    if not wanted and (names_any or len(files) > 1):
        names = ", ".join(str(p.relative_to(path)) for p in files[:5])
        raise DataError(f"{path}: no file name begins with {split!r}; found {names}")
    for file in wanted or files:
        yield from _READERS[_KIND_BY_SUFFIX[file.suffix]](file, split)


def _names(path: Path, split: str) -> bool:
    return path.name.startswith(split) or split in path.parts


def _known_split(path: Path, split: str, known: list[str]) -> str:
    if split not in known:
        raise DataError(f"{path} has no split {split!r}; the splits are {', '.join(known)}")
    return split


def _kind_of(path: Path) -> str:
    if path.is_dir():
        return "datasets"
    kind = _KIND_BY_SUFFIX.get(path.suffix.lower())
    if kind is None:
        known = ", ".join(sorted(_KIND_BY_SUFFIX))
        raise DataError(f"{path}: unknown suffix {path.suffix!r}; use {known}, or set data.kind")
    return kind


def _is_saved_dataset(path: Path) -> bool:
    return any((path / name).exists() for name in ("dataset_dict.json", "state.json"))


def _never_empty(path: Path, reader: Reader, split: str) -> Iterator[Record]:
    is_empty = True
    for record in reader(path, split):
        is_empty = False
        yield record
    if is_empty:
        raise DataError(f"{path} has no records; give a file with at least one")


def _read_separated(path: Path, delimiter: str) -> Iterator[Record]:
    # `strict` makes an unclosed quote an error instead of one huge field.
    lines = csv.reader((line for _, line in _lines(path)), delimiter=delimiter, strict=True)
    header: list[str] | None = None
    while True:
        first_line = lines.line_num + 1
        try:
            values = next(lines, None)
        except csv.Error as error:
            raise DataError(f"{path}:{first_line}: malformed row: {error}") from error
        if values is None:
            return
        if header is None:
            header = _checked_header(values, path)
        elif values:
            where = f"{path}:{first_line}"
            yield Record(_matched(header, values, where), where)


def _checked_header(names: list[str], path: Path) -> list[str]:
    doubled = sorted({name for name in names if names.count(name) > 1})
    if doubled:
        raise DataError(f"{path}:1: column names {doubled} appear twice; rename one")
    return names


def _matched(header: list[str], values: list[str], where: str) -> dict[str, object]:
    if len(values) != len(header):
        raise DataError(
            f"{where}: {len(values)} values for {len(header)} columns; "
            "put text that holds the separator in double quotes"
        )
    return dict(zip(header, values, strict=True))


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Decoded lines with their number; bytes are decoded per line so that errors name the line."""
    with _foreign_errors(path, "file", (OSError,)), path.open("rb") as file:
        for number, raw in enumerate(file, start=1):
            try:
                line = raw.decode("utf-8")
            except UnicodeDecodeError as error:
                raise DataError(
                    f"{path}:{number}: byte {error.start} of the line (0x{raw[error.start]:02x}) "
                    "is not UTF-8; convert the file to UTF-8"
                ) from error
            yield number, line.removeprefix(_BYTE_ORDER_MARK) if number == 1 else line


def _json_object(line: str, where: str) -> dict[str, object]:
    try:
        value = json.loads(line)
    except json.JSONDecodeError as error:
        # Not `error.doc`: the message must not carry the owner's text.
        raise DataError(f"{where}: malformed JSON at column {error.colno}: {error.msg}") from None
    except (RecursionError, ValueError) as error:
        raise DataError(f"{where}: malformed JSON: nested too deep or number too long") from error
    if not isinstance(value, dict):
        raise DataError(f"{where}: {_type_name(value)}, expected one JSON object per line")
    return value


@contextmanager
def _foreign_errors(path: Path, what: str, kinds: tuple[type[Exception], ...]) -> Iterator[None]:
    try:
        yield
    except DataError:
        raise
    except kinds as error:
        raise DataError(f"{path} is not a readable {what}: {error}") from error


def _type_name(value: object) -> str:
    names = {"NoneType": "null", "dict": "an object", "list": "a list"}
    return names.get(type(value).__name__, f"a value of type {type(value).__name__}")
