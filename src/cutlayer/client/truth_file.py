"""The owner's truth beside a recording: the tokens behind what left, for scoring attacks.

It does not record frames nor match anything (`audit.truth`). The file holds private text: it is
written only when the owner asks, mode 0600, and never leaves the owner.
"""

import hashlib
import os
import threading
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import msgspec
from torch import Tensor

from cutlayer.data.template import Example
from cutlayer.errors import StorageError
from cutlayer.model.rows import Rows
from cutlayer.privacy.packed_rows import sliced
from cutlayer.wire.packed import Packed

__all__ = ["TruthLine", "TruthWriter", "read_truth", "vector_chain", "vector_digests"]

_CHAIN_BYTES = 8


class _Start(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """First line of the file."""

    format: str = "cutlayer truth"
    version: int = 1


class TruthLine(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One row of one release."""

    row: str
    """Name of the row, as the boundary has it; empty in generation, where all are named alike."""
    start: int
    """Position of its first vector, in tokens."""
    tokens: list[int]
    labels: list[int]
    """-100 where not scored; empty in generation."""
    private: list[bool]
    """Text of the record, not the template's own; empty: all are."""
    chain: list[str]
    """`vector_chain` of what left: finds these vectors again in any grouping."""
    stays: list[bool] = msgspec.field(default_factory=list)
    """Whether each token's vector was withheld; empty: none was."""


class TruthWriter:
    """A truth file being written. Thread-safe."""

    def __init__(self, path: Path) -> None:
        """Make the file.

        Raises:
            StorageError: it is there already, or cannot be written.
        """
        self._path = path
        self._lock = threading.Lock()
        self._examples: dict[str, Example] = {}
        try:
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
            self._file = open(os.open(path, flags, 0o600), "wb")  # noqa: SIM115 - see close
        except FileExistsError as error:
            raise StorageError(f"cannot write {path}: it exists; choose a new name") from error
        except OSError as error:
            raise StorageError(f"cannot write {path}: {error.strerror}") from error
        self._append(_Start())

    def learn(self, examples: Iterable[Example]) -> None:
        """Remember whose labels and private tokens to write when a row of training leaves."""
        self._examples.update((f"row{example.row_id}", example) for example in examples)

    def note(
        self, rows: Rows, row_ids: Sequence[str], packed: Packed, withheld_N: Tensor | None
    ) -> None:
        """Write down what has just passed the gate.

        Args:
            rows: with tokens.
            row_ids: names of the rows.
            packed: what was released, [M, D].
            withheld_N: bool, what was withheld; None where nothing was.

        Raises:
            StorageError: the file cannot be written.
        """
        assert rows.tokens_N is not None
        tokens_N, digests = rows.tokens_N.tolist(), vector_digests(packed)
        stays_N = [] if withheld_N is None or not withheld_N.any() else withheld_N.tolist()
        first = 0
        for index, (name, start) in enumerate(zip(row_ids, rows.starts, strict=True)):
            begin, end = rows.offsets[index], rows.offsets[index + 1]
            known, stays = self._examples.get(name), stays_N[begin:end]
            last = first + end - begin - sum(stays)
            line = TruthLine(
                row="" if known is None else name,
                start=start,
                tokens=tokens_N[begin:end],
                labels=[] if known is None else list(known.labels),
                private=[] if known is None else list(known.is_private),
                chain=list(vector_chain(digests[first:last], start)),
                stays=stays,
            )
            first = last
            self._append(line)

    def close(self) -> None:
        """End the file."""
        self._file.close()

    def _append(self, line: _Start | TruthLine) -> None:
        data = msgspec.json.encode(line) + b"\n"
        try:
            with self._lock:
                self._file.write(data)
                self._file.flush()
        except OSError as error:
            raise StorageError(f"cannot write {self._path}: {error.strerror}") from error


def vector_digests(packed: Packed) -> list[bytes]:
    """SHA-256 of each vector's own bytes, over all buffers."""
    return [
        hashlib.sha256(b"".join(sliced(packed, index, index + 1).buffers)).digest()
        for index in range(packed.shape[0])
    ]


def vector_chain(digests: Iterable[bytes], start: int) -> Iterator[str]:
    """One name per vector, which depends on all vectors up to it; 16 hex digits.

    Vectors may be sent again in other pieces: a piece's first vectors have the same chain.

    Args:
        digests: `vector_digests` of one row's consecutive vectors.
        start: position of the first one.
    """
    running = hashlib.sha256(f"{start}:".encode())
    for digest in digests:
        running.update(digest)
        yield running.hexdigest()[: 2 * _CHAIN_BYTES]


def read_truth(path: Path) -> Iterator[TruthLine]:
    """The lines of a truth file, in the order in which rows left; half a last line is passed over.

    Raises:
        StorageError: it cannot be read, or is no truth file.
    """
    try:
        with path.open("rb") as file:
            _check_start(path, file.readline())
            for number, data in enumerate(file, 2):
                if data.endswith(b"\n"):
                    yield _line(path, number, data)
    except OSError as error:
        raise StorageError(f"cannot read {path}: {error.strerror}") from error


def _check_start(path: Path, data: bytes) -> None:
    try:
        start = msgspec.json.decode(data, type=_Start)
    except ValueError as error:
        raise StorageError(
            f"{path} is no truth file: it is written beside a recording by --truth"
        ) from error
    if start != _Start():
        raise StorageError(f"{path}: truth of version {start.version}; this software reads 1")


def _line(path: Path, number: int, data: bytes) -> TruthLine:
    try:
        line = msgspec.json.decode(data, type=TruthLine)
    except ValueError as error:
        raise StorageError(f"{path}, line {number} is damaged: {error}") from error
    count = len(line.tokens)
    lengths = (len(line.labels), len(line.private), len(line.stays))
    num_left = count - sum(line.stays)
    if len(line.chain) != num_left or {length or count for length in lengths} != {count}:
        raise StorageError(f"{path}, line {number} is damaged: its lists differ in length")
    return line
