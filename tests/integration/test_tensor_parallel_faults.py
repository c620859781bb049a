"""A process of a tensor-parallel trunk that dies or stops: nobody waits for ever, all say why."""

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from tests.tiny_models import tiny_llama_folder

ROOT = Path(__file__).parents[2]
WORKER = "tests.integration.tensor_parallel_fault_worker"
TIMEOUT_S = 3.0
WAIT_S = 60.0
Process = subprocess.Popen[str]


@contextmanager
def process(rank: int, port: int, folder: Path) -> Iterator[Process]:
    """As torchrun starts one."""
    environment = {
        **os.environ,
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    started = subprocess.Popen(
        [sys.executable, "-m", WORKER, str(folder), str(TIMEOUT_S)],
        cwd=ROOT,
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with started:
        try:
            yield started
        finally:
            started.kill()


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[tuple[Process, Process]]:
    """Leader and follower after their first call."""
    folder = tiny_llama_folder(tmp_path)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with ExitStack() as stack:
        leader, follower = [stack.enter_context(process(r, port, folder)) for r in (0, 1)]
        assert leader.stdout is not None
        assert leader.stdout.readline() == "ready\n"
        yield leader, follower


def finish(started: Process, line: str = "") -> dict[str, object]:
    """Send a line, and read what the process says last."""
    out, _ = started.communicate(line, timeout=WAIT_S)
    told = json.loads(out.splitlines()[-1])
    assert isinstance(told, dict)
    return told


def check_leader(told: dict[str, object], longest_s: float) -> None:
    errors, waits_s, reasons = told["errors"], told["waits_s"], told["reasons"]
    assert isinstance(errors, list)
    assert isinstance(waits_s, list)
    assert len(errors) == 2
    assert "start all of its processes again" in errors[0]
    assert waits_s[0] < longest_s
    # The second call does not try again.
    assert waits_s[1] < 0.5
    assert reasons == [errors[0]]


def test_leader_says_at_once_that_a_follower_was_killed(pair: tuple[Process, Process]) -> None:
    leader, follower = pair
    follower.kill()
    follower.wait(WAIT_S)
    check_leader(finish(leader, "go\n"), longest_s=2.0)
    assert leader.returncode == 0


def test_silent_follower_is_given_up_and_then_ends_too(pair: tuple[Process, Process]) -> None:
    leader, follower = pair
    os.kill(follower.pid, signal.SIGSTOP)
    try:
        check_leader(finish(leader, "go\n"), longest_s=TIMEOUT_S + 10)
    finally:
        os.kill(follower.pid, signal.SIGCONT)
    assert "rank 1 of 2" in str(finish(follower)["error"])
