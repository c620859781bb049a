"""Recordings: one file of the frames of a run as the server saw them; the spec is
docs/recording.md.

It reads alone (`recorder` writes) and does not interpret frames, which is an audit's work. What it
reads may come from anybody: each length is checked before anything is allocated, and every refusal
is a `StorageError` or, inside a frame, a `ProtocolError`.
"""

import hashlib
import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import BinaryIO, NamedTuple

import msgspec

from cutlayer.errors import StorageError
from cutlayer.wire.frame import Frame, FrameLimits, decode
from cutlayer.wire.packed import Buffer

__all__ = [
    "ENTRY",
    "Direction",
    "RecordedFrame",
    "Recording",
    "RecordingHeader",
    "open_recording",
    "prelude_of",
    "trailer_of",
]

MAGIC = b"CUTL-REC"
VERSION = 1
_PRELUDE = struct.Struct("<8sHHI")
"""Magic, version, flags, header bytes."""
ENTRY = struct.Struct("<BBHIQQ")
"""Direction, two zeros, connection, microseconds, bytes that follow."""
_TRAILER = struct.Struct("<Q32s")
"""Number of frames, SHA-256 of everything before the trailer's entry."""
_MAX_HEADER_BYTES = 1 << 20
_CHUNK_BYTES = 1 << 20


class Direction(IntEnum):
    """What an entry is."""

    SENT = 1
    """Client to server."""
    RECEIVED = 2
    """Server to client."""
    END = 3
    """The trailer; nothing follows it."""


class RecordingHeader(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What the frames are of. Everything but `rules` is also told to the server in HELLO."""

    software: str
    """Name and version of what recorded."""
    spec: dict[str, str | int]
    """`wire.spec.Spec`: model type, cut, codecs."""
    leaves: dict[str, str]
    """Manifest leaves of head and tail: name -> SHA-256 hex."""
    rules: dict[str, str | float | bool | None]
    """Settings of the noise at both cuts: an attacker is told them by design."""


@dataclass(frozen=True, kw_only=True)
class RecordedFrame:
    """One frame of a recording."""

    number: int
    """Order in which frames crossed, from 1."""
    is_sent: bool
    """True for client to server."""
    connection: int
    """Which connection of the run, from 1."""
    time_s: float
    """Seconds since the recording began."""
    frame: Frame
    """`call_id` is the recording's: a reply has that of its call, and no two calls share one."""


class _Entry(NamedTuple):
    direction: Direction
    connection: int
    time_us: int
    num_bytes: int


@dataclass(frozen=True, kw_only=True)
class Recording:
    """A recording whose structure was checked; frames are read when they are wanted."""

    path: Path
    header: RecordingHeader
    num_frames: int
    """Whole frames."""
    is_whole: bool
    """False where the end is missing."""
    limits: FrameLimits

    def frames(self) -> Iterator[RecordedFrame]:
        """The frames in the order in which they crossed.

        Raises:
            StorageError: the file cannot be read, or has changed.
            ProtocolError: an entry does not hold exactly one frame within the limits.
        """
        with _opened(self.path) as (file, size):
            _read_start(file, size, self.path)
            for number in range(1, self.num_frames + 1):
                entry = _read_entry(file, size, self.path)
                if entry is None or entry.num_bytes > self.limits.max_frame_bytes:
                    raise StorageError(
                        f"{self.path}: frame {number} is larger than "
                        f"{self.limits.max_frame_bytes} bytes, or the file has changed"
                    )
                # Writable, so that tensors are views of it.
                data = bytearray(entry.num_bytes)
                _fill(file, data, self.path)
                yield RecordedFrame(
                    number=number,
                    is_sent=entry.direction is Direction.SENT,
                    connection=entry.connection,
                    time_s=entry.time_us / 1e6,
                    frame=decode(data, self.limits),
                )


def open_recording(
    path: Path, limits: FrameLimits | None = None, accepts_truncated: bool = False
) -> Recording:
    """Check a recording from its first byte to its last.

    Args:
        path: the file.
        limits: of its frames.
        accepts_truncated: take one without its end, as a killed run leaves it; its whole frames
            can then be read, but nothing vouches that they are unchanged.

    Raises:
        StorageError: no recording, cut short, or its content is not what was recorded.
    """
    with _opened(path) as (file, size):
        digest = hashlib.sha256()
        header = _read_start(file, size, path, digest)
        num_frames, is_whole = 0, False
        while (entry := _read_entry(file, size, path)) is not None:
            if entry.direction is Direction.END:
                _check_trailer(file, entry, size, (num_frames, digest.digest()), path)
                is_whole = True
                break
            digest.update(ENTRY.pack(entry.direction, 0, 0, *entry[1:]))
            _skip(file, entry.num_bytes, path, digest)
            num_frames += 1
    if not is_whole and not accepts_truncated:
        raise StorageError(
            f"{path} is cut short: {num_frames} whole frames and no end, as a run leaves it that "
            "was killed; record again, or accept what is there (--truncated)"
        )
    return Recording(
        path=path,
        header=header,
        num_frames=num_frames,
        is_whole=is_whole,
        limits=limits or FrameLimits(),
    )


def prelude_of(header: RecordingHeader) -> bytes:
    """The first bytes of a recording."""
    data = msgspec.msgpack.encode(header)
    assert len(data) <= _MAX_HEADER_BYTES
    return _PRELUDE.pack(MAGIC, VERSION, 0, len(data)) + data


def trailer_of(num_frames: int, digest: bytes) -> bytes:
    """The last bytes of a recording."""
    return ENTRY.pack(Direction.END, 0, 0, 0, 0, _TRAILER.size) + _TRAILER.pack(num_frames, digest)


def _read_start(
    file: BinaryIO, size: int, path: Path, digest: "hashlib._Hash | None" = None
) -> RecordingHeader:
    if size < _PRELUDE.size:
        raise StorageError(f"{path} is no recording: it has {size} bytes; see docs/recording.md")
    prelude = file.read(_PRELUDE.size)
    magic, version, flags, num_bytes = _PRELUDE.unpack(prelude)
    if magic != MAGIC:
        raise StorageError(f"{path} is no recording of cutlayer; make one with --record")
    if version != VERSION or flags:
        raise StorageError(
            f"{path} is a recording of version {version}, flags {flags}; this software reads "
            f"version {VERSION} without flags: record again"
        )
    if num_bytes > min(_MAX_HEADER_BYTES, size - _PRELUDE.size):
        raise StorageError(f"{path} is cut short or damaged: a header of {num_bytes} bytes")
    data = file.read(num_bytes)
    if digest is not None:
        digest.update(prelude + data)
    try:
        return msgspec.msgpack.decode(data, type=RecordingHeader)
    except (ValueError, RecursionError) as error:
        raise StorageError(f"{path}: the recording's header is malformed: {error}") from error


def _read_entry(file: BinaryIO, size: int, path: Path) -> _Entry | None:
    """The next entry; None where the rest of the file does not hold all of it."""
    data = file.read(ENTRY.size)
    if len(data) < ENTRY.size:
        return None
    direction, zero, other_zero, connection, time_us, num_bytes = ENTRY.unpack(data)
    if direction not in iter(Direction) or zero or other_zero:
        raise StorageError(f"{path} is damaged: an entry of unknown kind {direction}")
    if num_bytes > size - file.tell():
        return None
    return _Entry(Direction(direction), connection, time_us, num_bytes)


def _check_trailer(
    file: BinaryIO, entry: _Entry, size: int, counted: tuple[int, bytes], path: Path
) -> None:
    data = file.read(_TRAILER.size)
    if entry[1:] != (0, 0, _TRAILER.size) or file.tell() != size:
        raise StorageError(f"{path} is damaged: its end is malformed, or bytes follow it")
    if _TRAILER.unpack(data) != counted:
        raise StorageError(
            f"{path} is damaged: its {counted[0]} frames are not what was recorded (the count or "
            "the SHA-256 at its end differs); record again"
        )


def _skip(file: BinaryIO, num_bytes: int, path: Path, digest: "hashlib._Hash") -> None:
    while num_bytes:
        chunk = file.read(min(num_bytes, _CHUNK_BYTES))
        if not chunk:
            raise StorageError(f"{path} changed while it was read")
        digest.update(chunk)
        num_bytes -= len(chunk)


def _fill(file: BinaryIO, data: Buffer, path: Path) -> None:
    if file.readinto(data) != len(data):  # type: ignore[attr-defined]
        raise StorageError(f"{path} changed while it was read")


@contextmanager
def _opened(path: Path) -> Iterator[tuple[BinaryIO, int]]:
    try:
        with path.open("rb") as file:
            yield file, os.fstat(file.fileno()).st_size
    except OSError as error:
        raise StorageError(f"cannot read recording {path}: {error.strerror}") from error
