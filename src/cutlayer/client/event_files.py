"""TensorBoard event files of the owner's own training, in a private folder.

It does not measure nor send anything: losses stay on this machine. The files are in TensorBoard's
format, by the package tensorboardX (extra `tensorboard`).
"""

import os
import secrets
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Protocol

from cutlayer.client.run_state import StepRecord
from cutlayer.client.train import Report
from cutlayer.errors import ConfigError
from cutlayer.storage.files import explain_os_errors, private_folder

__all__ = ["EventFiles", "Traffic", "reporting"]

_FLUSH_EVERY_S = 2.0
"""Longest time that a finished step is only in memory."""
_FILE_VERSION = "brain.Event:2"
"""What TensorBoard wants a file's first event to say."""


class Traffic(Protocol):
    """Where bytes are counted, such as `client.remote_trunk.RemoteTrunk`."""

    @property
    def bytes_sent(self) -> int:
        """So far."""

    @property
    def bytes_received(self) -> int:
        """So far."""


class EventFiles:
    """One event file of one process; TensorBoard joins those of a folder into one run."""

    def __init__(
        self,
        folder: Path,
        traffic: Traffic | None = None,
        steps_per_round: int | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """Open a new file with mode 0600 in a folder with mode 0700.

        Args:
            folder: made if it does not exist.
            traffic: counts the bytes; None writes none.
            steps_per_round: of a federation; None where there are no rounds.
            clock: wall time in seconds.

        Raises:
            ConfigError: tensorboardX is not installed.
            StorageError: the folder is open to others, or cannot be written.
        """
        self._writer = _Writer(folder, clock)
        self._traffic = traffic
        self._steps_per_round = steps_per_round
        self._clock = clock
        self._last_step: int | None = None
        self._last_s = clock()
        self._last_bytes = self._bytes()
        self._round_bytes = self._last_bytes
        self._round_loss_sum, self._round_scored = 0.0, 0

    def __enter__(self) -> "EventFiles":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def step(self, report: Report) -> None:
        """Write one finished step, and the round that it ends."""
        record, now_s = report.record, self._clock()
        if self._last_step is None or record.step <= self._last_step:
            # A run that went back writes these steps again.
            self._writer.restart(record.step)
        values = {
            "train/loss": record.loss,
            "train/grad_norm": record.grad_norm,
            "train/lr": record.lr,
            "train/tokens_per_s": record.num_tokens / max(1e-9, now_s - self._last_s),
        }
        if report.validation_loss is not None:
            values["validation/loss"] = report.validation_loss
        so_far = self._bytes()
        if self._traffic is not None:
            values |= _difference("wire", so_far, self._last_bytes)
        self._writer.scalars(record.step, values)
        self._last_step, self._last_s, self._last_bytes = record.step, now_s, so_far
        self._end_round(record)

    def close(self) -> None:
        """Write what is in memory."""
        self._writer.close()

    def _end_round(self, record: StepRecord) -> None:
        if self._steps_per_round is None:
            return
        if (record.step - 1) % self._steps_per_round == 0:
            self._round_loss_sum, self._round_scored = 0.0, 0
        self._round_loss_sum += record.loss * record.num_scored
        self._round_scored += record.num_scored
        if record.step % self._steps_per_round:
            return
        so_far = self._bytes()
        values = {"round/loss": self._round_loss_sum / max(1, self._round_scored)}
        if self._traffic is not None:
            values |= _difference("round", so_far, self._round_bytes)
        self._writer.scalars(record.step // self._steps_per_round, values)
        self._round_bytes = so_far

    def _bytes(self) -> tuple[int, int]:
        if self._traffic is None:
            return 0, 0
        return self._traffic.bytes_sent, self._traffic.bytes_received


class _Writer:
    """Events into one file: on the disk some seconds after they were made."""

    def __init__(self, folder: Path, clock: Callable[[], float]) -> None:
        event_pb2, summary_pb2, record_writer = _load_formats()
        self._event, self._summary = event_pb2, summary_pb2
        self._clock = clock
        self._flushed_s = clock()
        path = private_folder(folder).resolve() / _new_name(self._flushed_s)
        with explain_os_errors(f"create {path}"):
            os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
            self._records = record_writer.RecordWriter(str(path))
        self._path = path
        self._write(file_version=_FILE_VERSION)

    def restart(self, step: int) -> None:
        """What was written of this step and later ones does not count."""
        start = self._event.SessionLog(status=self._event.SessionLog.START)
        self._write(step=step, session_log=start)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """One value per tag."""
        summary = self._summary.Summary()
        for tag, value in values.items():
            summary.value.add(tag=tag, simple_value=value)
        self._write(step=step, summary=summary)
        if self._clock() - self._flushed_s >= _FLUSH_EVERY_S:
            self.flush()

    def flush(self) -> None:
        """Onto the disk."""
        with explain_os_errors(f"write {self._path}"):
            self._records.flush()
        self._flushed_s = self._clock()

    def close(self) -> None:
        """End the file."""
        self.flush()
        self._records.close()

    def _write(self, **fields: object) -> None:
        event = self._event.Event(wall_time=self._clock(), **fields)
        with explain_os_errors(f"write {self._path}"):
            self._records.write(event.SerializeToString())


def _load_formats() -> tuple[ModuleType, ModuleType, ModuleType]:
    try:
        from tensorboardX import record_writer
        from tensorboardX.proto import event_pb2, summary_pb2
    except ImportError as error:
        raise ConfigError(
            "event files need tensorboardX, which is not installed: "
            "pip install cutlayer[tensorboard], or leave the event folder out"
        ) from error
    return event_pb2, summary_pb2, record_writer


def _new_name(now_s: float) -> str:
    """TensorBoard reads a folder's files in the order of their names."""
    return f"events.out.tfevents.{now_s:017.6f}.{secrets.token_hex(4)}"


def _difference(prefix: str, now: tuple[int, int], before: tuple[int, int]) -> dict[str, float]:
    up, down = (float(n - b) for n, b in zip(now, before, strict=True))
    return {f"{prefix}/bytes_up": up, f"{prefix}/bytes_down": down}


@contextmanager
def reporting(
    folder: Path | None, traffic: Traffic, on_step: Callable[[Report], None]
) -> Iterator[Callable[[Report], None]]:
    """Hand each report on, and to event files where a folder is named.

    Args:
        folder: of the event files; None writes none.
        traffic: counts the bytes.
        on_step: who else is told.
    """
    if folder is None:
        yield on_step
        return
    with ExitStack() as stack:
        files: list[EventFiles] = []

        def report(step: Report) -> None:
            if not files:
                files.append(stack.enter_context(EventFiles(folder, traffic, step.steps_per_round)))
            files[0].step(step)
            on_step(step)

        yield report
