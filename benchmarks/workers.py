"""Measured processes that stay: each is started once and answers one request after the other.

A process says `ready`, waits for `go`, may say `mark` after each of its steps and wait for the next
`go`, and ends with its answer, all as lines of its pipes. It does not know what is measured.
"""

import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import TypeVar

import msgspec

from benchmarks.isolate import start_process

__all__ = ["Worker", "WorkerGroup", "mark", "peak_bytes", "requests", "say_ready"]

T = TypeVar("T")

_READY, _MARK, _GO = "ready", "mark", "go"


class Worker:
    """The parent's end of one process."""

    def __init__(self, module: str, num_threads: int) -> None:
        """Start `python -m module`."""
        self._module = module
        self._process = start_process(module, num_threads)

    @property
    def pid(self) -> int:
        """Of the process."""
        return self._process.pid

    def send(self, request: msgspec.Struct) -> None:
        """Hand over a request."""
        self._write(msgspec.json.encode(request).decode())

    def go(self) -> None:
        """Let it begin, or take its next step."""
        self._write(_GO)

    def expect_ready(self) -> None:
        """Wait until it is ready for its request."""
        self._expect(_READY)

    def expect_mark(self) -> None:
        """Wait for the end of a step."""
        self._expect(_MARK)

    def result(self, answer_type: type[T]) -> T:
        """Wait for the answer.

        Raises:
            RuntimeError: the process failed; its own words are on stderr.
        """
        return msgspec.json.decode(self._read(), type=answer_type)

    def finish(self) -> None:
        """No more requests: the process ends by itself."""
        assert self._process.stdin is not None
        self._process.stdin.close()

    def close(self) -> None:
        """Wait for the end, or end it."""
        self.finish()
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        assert self._process.stdout is not None
        self._process.stdout.close()

    def _write(self, line: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()

    def _read(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self._module} ended with status {self._process.wait()}")
        return line.strip()

    def _expect(self, word: str) -> None:
        line = self._read()
        if line != word:
            raise RuntimeError(f"{self._module} said {line[:80]!r}, expected {word!r}")


class WorkerGroup:
    """Several processes of one module; a context manager."""

    def __init__(self, module: str, count: int, num_threads: int) -> None:
        """Start `count` processes of `num_threads` torch threads each."""
        self.workers = [Worker(module, num_threads) for _ in range(count)]
        self.num_threads = num_threads

    def __enter__(self) -> "WorkerGroup":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for worker in self.workers:
            worker.finish()
        for worker in self.workers:
            worker.close()

    def prepare(self, requests: Sequence[msgspec.Struct]) -> list[Worker]:
        """Hand one request to each of the first processes, and wait until all are ready."""
        chosen = self.workers[: len(requests)]
        for worker, request in zip(chosen, requests, strict=True):
            worker.send(request)
        for worker in chosen:
            worker.expect_ready()
        return chosen


def requests(request_type: type[T]) -> Iterator[T]:
    """In the measured process: the requests from stdin, until it is closed."""
    for line in iter(sys.stdin.readline, ""):
        yield msgspec.json.decode(line, type=request_type)


def say_ready() -> None:
    """In the measured process: all is set up; returns at the parent's `go`."""
    _say(_READY)


def mark() -> None:
    """In the measured process: a step is done; returns at the parent's next `go`."""
    _say(_MARK)


def peak_bytes(pid: int | str = "self") -> int:
    """Largest resident set of a living process so far (VmHWM of /proc), in bytes."""
    status = Path(f"/proc/{pid}/status").read_text()
    (line,) = [line for line in status.splitlines() if line.startswith("VmHWM:")]
    return int(line.split()[1]) * 1024


def _say(word: str) -> None:
    print(word, flush=True)
    sys.stdin.readline()
