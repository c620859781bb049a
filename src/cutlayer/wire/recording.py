"""Recordings: every frame as it crossed the boundary, one file each, for audits.

It does not interpret them (that is an audit's work) nor change what is sent. A recording holds
what the server saw and nothing else of the client.
"""

import os
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import dataclass, replace
from pathlib import Path

from cutlayer.errors import CutlayerError, StorageError
from cutlayer.wire.channel import Channel, failed_frame
from cutlayer.wire.frame import Frame, FrameLimits, decode, encode

__all__ = ["RecordedFrame", "RecordingChannel", "read_recording"]

_SENT, _RECEIVED = "sent", "received"


@dataclass(frozen=True, kw_only=True)
class RecordedFrame:
    """One frame of a recording."""

    number: int
    """Order in which frames crossed, from 1."""
    is_sent: bool
    """True for client to server."""
    frame: Frame
    """`call_id` is the recording's: a reply has that of its call."""


class RecordingChannel:
    """A channel that writes each frame to `folder` before it is sent and when it arrives."""

    def __init__(self, inner: Channel, folder: Path) -> None:
        self._inner = inner
        self._folder = folder
        self._lock = threading.Lock()
        self._num_frames = 0
        self._num_calls = 0
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            used = next(folder.iterdir(), None)
        except OSError as error:
            raise StorageError(f"cannot record to {folder}: {error.strerror}") from error
        if used is not None:
            raise StorageError(f"cannot record to {folder}: it is not empty; choose a new folder")

    @property
    def bytes_sent(self) -> int:
        """Bytes that the inner channel sent."""
        return self._inner.bytes_sent

    @property
    def bytes_received(self) -> int:
        """Bytes that the inner channel received."""
        return self._inner.bytes_received

    def call(self, frame: Frame, deadline_s: float | None = None) -> Future[Frame]:
        """Record, then call; a failure is recorded as the FAILED frame that it amounts to.

        Raises:
            StorageError: the frame cannot be written; nothing was sent.
        """
        with self._lock:
            self._num_calls += 1
            call = replace(frame, call_id=self._num_calls)
        self._write(call, _SENT)
        outcome: Future[Frame] = Future()
        outcome.set_running_or_notify_cancel()
        inner = self._inner.call(frame, deadline_s)
        inner.add_done_callback(lambda done: self._receive(call, done, outcome))
        return outcome

    def close(self) -> None:
        """Close the inner channel."""
        self._inner.close()

    def _receive(self, call: Frame, done: Future[Frame], outcome: Future[Frame]) -> None:
        error = done.exception()
        try:
            if error is None:
                self._write(replace(done.result(), call_id=call.call_id), _RECEIVED)
            elif isinstance(error, CutlayerError):
                self._write(failed_frame(call, error), _RECEIVED)
        except StorageError as storage_error:
            error = storage_error
        if error is None:
            outcome.set_result(done.result())
        else:
            outcome.set_exception(error)

    def _write(self, frame: Frame, direction: str) -> None:
        with self._lock:
            self._num_frames += 1
            number = self._num_frames
        path = self._folder / f"{number:08d}-{direction}-{frame.kind.name.lower()}.frame"
        # Renamed when whole: a recorder that is killed leaves no frame cut short.
        part = path.with_suffix(".part")
        try:
            with open(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
                file.writelines(encode(frame))
            part.rename(path)
        except OSError as error:
            raise StorageError(f"cannot record {path}: {error.strerror}") from error


def read_recording(folder: Path, limits: FrameLimits | None = None) -> Iterator[RecordedFrame]:
    """The frames of a recording in the order in which they crossed.

    Raises:
        StorageError: the folder or a file cannot be read.
        ProtocolError: a file does not hold exactly one frame.
    """
    try:
        paths = sorted(folder.glob("*.frame")) if folder.is_dir() else None
        if paths is None:
            raise StorageError(f"no recording at {folder}: it is not a folder")
        for path in paths:
            number, direction, _ = path.stem.split("-", 2)
            frame = decode(bytearray(path.read_bytes()), limits)
            yield RecordedFrame(number=int(number), is_sent=direction == _SENT, frame=frame)
    except OSError as error:
        raise StorageError(f"cannot read recording {folder}: {error.strerror}") from error
    except ValueError as error:
        raise StorageError(f"{folder} holds a file that no recording has: {error}") from error
