"""Write a recording: every frame of a run before it is sent and when it arrives, into one file.

It does not change what is sent nor interpret it; the format is in `recording`. A recording holds
what the server saw, and of the client nothing else but its noise rules.
"""

import hashlib
import os
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from cutlayer.errors import CutlayerError, StorageError
from cutlayer.wire.channel import Channel, failed_frame
from cutlayer.wire.frame import Frame, encode
from cutlayer.wire.packed import Buffer
from cutlayer.wire.recording import ENTRY, Direction, RecordingHeader, prelude_of, trailer_of
from cutlayer.wire.wrapped import WrappedChannel

__all__ = ["Recorder", "RecordingChannel"]


class Recorder:
    """One file being written, by all connections of a run. Thread-safe."""

    def __init__(self, path: Path, header: RecordingHeader) -> None:
        """Make the file, mode 0600.

        Raises:
            StorageError: it is there already, or cannot be written.
        """
        self.path = path
        self._lock = threading.Lock()
        self._digest = hashlib.sha256()
        self._num_frames = self._num_calls = self._num_connections = 0
        self._began_s = time.monotonic()
        try:
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        except FileExistsError as error:
            raise StorageError(
                f"cannot record to {path}: it exists; a recording is of one process, choose a "
                "new name"
            ) from error
        except OSError as error:
            raise StorageError(f"cannot record to {path}: {error.strerror}") from error
        self._file = open(descriptor, "wb")  # noqa: SIM115 - closed by `close`
        self._append([prelude_of(header)])

    def channel(self, inner: Channel) -> "RecordingChannel":
        """A channel whose frames are recorded as one connection."""
        with self._lock:
            self._num_connections += 1
            return RecordingChannel(inner, self, self._num_connections)

    def next_call_id(self) -> int:
        """A name for a call that no other of the recording has."""
        with self._lock:
            self._num_calls += 1
            return self._num_calls

    def write(self, direction: Direction, connection: int, frame: Frame) -> None:
        """Append one frame; the operating system has it when this returns.

        Raises:
            StorageError: the file is closed or cannot be written.
        """
        buffers = encode(frame)
        with self._lock:
            if self._file.closed:
                raise StorageError(f"cannot record to {self.path}: it is closed")
            num_bytes = sum(len(buffer) for buffer in buffers)
            self._append([ENTRY.pack(direction, 0, 0, connection, self._now_us(), num_bytes)])
            self._append(buffers)
            self._num_frames += 1

    def close(self) -> None:
        """Write the end; what arrives later is not part of the recording."""
        with self._lock:
            if self._file.closed:
                return
            trailer = trailer_of(self._num_frames, self._digest.digest())
            self._append([trailer])
            self._file.close()

    def _append(self, buffers: Sequence[Buffer]) -> None:
        try:
            self._file.writelines(buffers)
            self._file.flush()
        except OSError as error:
            # What is there ends in half an entry: nothing may follow it.
            with suppress(OSError):
                self._file.close()
            raise StorageError(f"cannot record to {self.path}: {error.strerror}") from error
        for buffer in buffers:
            self._digest.update(buffer)

    def _now_us(self) -> int:
        return int((time.monotonic() - self._began_s) * 1e6)


class RecordingChannel(WrappedChannel):
    """A channel that records each frame before it is sent and when it arrives."""

    def __init__(self, inner: Channel, recorder: Recorder, connection: int) -> None:
        """Made by `Recorder.channel`."""
        super().__init__(inner)
        self._recorder = recorder
        self._connection = connection

    def call(self, frame: Frame, deadline_s: float | None = None) -> Future[Frame]:
        """Record, then call; a failure is recorded as the FAILED frame that it amounts to.

        Raises:
            StorageError: the frame cannot be written; nothing was sent.
        """
        call = replace(frame, call_id=self._recorder.next_call_id())
        self._recorder.write(Direction.SENT, self._connection, call)
        outcome: Future[Frame] = Future()
        outcome.set_running_or_notify_cancel()
        inner = self._inner.call(frame, deadline_s)
        inner.add_done_callback(lambda done: self._receive(call, done, outcome))
        return outcome

    def _receive(self, call: Frame, done: Future[Frame], outcome: Future[Frame]) -> None:
        error = done.exception()
        try:
            if error is None:
                reply = replace(done.result(), call_id=call.call_id)
                self._recorder.write(Direction.RECEIVED, self._connection, reply)
            elif isinstance(error, CutlayerError):
                failed = failed_frame(call, error)
                self._recorder.write(Direction.RECEIVED, self._connection, failed)
        except StorageError as storage_error:
            error = error or storage_error
        if error is None:
            outcome.set_result(done.result())
        else:
            outcome.set_exception(error)
