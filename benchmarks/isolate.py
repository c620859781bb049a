"""Run a measurement in a process of its own, so that its thread setting is real.

OpenMP reads its environment once, when torch is imported: a measurement that shares a process with
another one measures that one's threads. It does not know what is measured.
"""

import os
import subprocess
import sys
from typing import TypeVar

import msgspec

__all__ = [
    "answer",
    "process_environment",
    "read_request",
    "run_isolated",
    "start_isolated",
    "start_process",
]

T = TypeVar("T", bound=msgspec.Struct)


def process_environment(num_threads: int) -> dict[str, str]:
    """The environment of a measured process: its threads, passive waiting, no progress bars."""
    threads = {"OMP_NUM_THREADS": str(num_threads), "MKL_NUM_THREADS": str(num_threads)}
    quiet = {"HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    return {**os.environ, **threads, **quiet, "OMP_WAIT_POLICY": "PASSIVE"}


def start_process(module: str, num_threads: int) -> "subprocess.Popen[str]":
    """Start `python -m module` with pipes at its stdin and stdout."""
    return subprocess.Popen(
        [sys.executable, "-m", module],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=process_environment(num_threads),
    )


def start_isolated(
    module: str, request: msgspec.Struct, num_threads: int
) -> "subprocess.Popen[str]":
    """Start `python -m module`, write the request as one JSON line, leave its stdin open."""
    process = start_process(module, num_threads)
    assert process.stdin is not None
    process.stdin.write(msgspec.json.encode(request).decode() + "\n")
    process.stdin.flush()
    return process


def run_isolated(
    module: str,
    request: msgspec.Struct,
    answer_type: type[T],
    *,
    num_threads: int,
    timeout_s: float = 900.0,
) -> T:
    """Run `python -m module` on one request; the last line of its stdout is the answer.

    Raises:
        RuntimeError: the process failed; its own words are on stderr.
    """
    with start_isolated(module, request, num_threads) as process:
        try:
            output, _ = process.communicate(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            process.kill()
            raise
    if process.returncode != 0:
        raise RuntimeError(f"{module} ended with status {process.returncode}")
    return msgspec.json.decode(output.splitlines()[-1], type=answer_type)


def read_request(request_type: type[T]) -> T:
    """In the measured process: the request from stdin."""
    return msgspec.json.decode(sys.stdin.readline(), type=request_type)


def answer(result: msgspec.Struct) -> None:
    """In the measured process: print the answer as the last line."""
    print(msgspec.json.encode(result).decode(), flush=True)
