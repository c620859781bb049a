"""Progress of training on stderr: a bar on a terminal, a line now and then elsewhere.

It does not train; it counts what the trainer reports.
"""

import time
from collections.abc import Callable
from types import TracebackType
from typing import Protocol

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Column

from cutlayer.cli.output import format_bytes
from cutlayer.client.event_files import Traffic
from cutlayer.client.train import Report

__all__ = ["TrainingProgress", "Watched"]

_LINES = 20
_WIDE = 120
_SMOOTHING = 0.3


class Watched(Protocol):
    """Who trains: a client of a trunk server, or of an enclave."""

    @property
    def trunk(self) -> Traffic:
        """Where its bytes are counted."""

    @property
    def guarantee(self) -> str:
        """To be printed beside every result."""


class TrainingProgress:
    """Shows each report, and keeps the totals for the result."""

    def __init__(self, client: Watched, now_s: Callable[[], float] = time.monotonic) -> None:
        self.num_tokens = 0
        self.num_steps = 0
        self.bytes_up = self.bytes_down = 0
        self.first_loss: float | None = None
        self._client = client
        self._now_s = now_s
        self._began_s = self._last_s = now_s()
        self._rate = 0.0
        self._console = Console(stderr=True, highlight=False, soft_wrap=True)
        self._bar = Progress(
            *_columns(self._console.width),
            console=self._console,
            disable=not self._console.is_terminal,
        )
        self._task = self._bar.add_task("train", total=None, status="")
        self._validation_loss: float | None = None

    def __enter__(self) -> "TrainingProgress":
        self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bar.stop()

    @property
    def seconds(self) -> float:
        """Since the beginning."""
        return self._now_s() - self._began_s

    def show(self, report: Report) -> None:
        """Take one finished step in."""
        record = report.record
        self.first_loss = record.loss if self.first_loss is None else self.first_loss
        self.num_tokens += record.num_tokens
        self.num_steps += 1
        if report.validation_loss is not None:
            self._validation_loss = report.validation_loss
        self._measure(record.num_tokens)
        status = self._status(record.loss)
        self._bar.update(self._task, total=report.num_steps, completed=record.step, status=status)
        is_due = record.step % max(1, report.num_steps // _LINES) == 0
        if not self._console.is_terminal and (is_due or record.step == report.num_steps):
            self._console.print(f"step {record.step}/{report.num_steps} {status}", markup=False)

    def _measure(self, num_tokens: int) -> None:
        now_s = self._now_s()
        rate = num_tokens / max(1e-9, now_s - self._last_s)
        self._rate = rate if not self._rate else self._rate + _SMOOTHING * (rate - self._rate)
        self._last_s = now_s
        self.bytes_up = self._client.trunk.bytes_sent
        self.bytes_down = self._client.trunk.bytes_received

    def _status(self, loss: float) -> str:
        parts = [f"loss {loss:.4f}"]
        if self._validation_loss is not None:
            parts.append(f"validation {self._validation_loss:.4f}")
        parts.append(f"{self._rate:.0f} tokens/s")
        parts.append(f"up {format_bytes(self.bytes_up)} down {format_bytes(self.bytes_down)}")
        parts.append(self._client.guarantee)
        return "  ".join(parts)


def _columns(width: int) -> list[ProgressColumn]:
    """Numbers first: a narrow terminal wraps them, and has no room for a bar."""
    status = TextColumn("{task.fields[status]}", table_column=Column(no_wrap=False))
    numbers: list[ProgressColumn] = [TextColumn("step"), MofNCompleteColumn(), status]
    bar: list[ProgressColumn] = [BarColumn(bar_width=16), TimeRemainingColumn()]
    return [*numbers, *bar] if width >= _WIDE else numbers
