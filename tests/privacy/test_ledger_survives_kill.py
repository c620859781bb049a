"""kill -9 at any moment: whatever a client could have sent is in its ledger, and none is lost."""

import os
import random
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch

from cutlayer.model.rows import Rows
from cutlayer.privacy.boundary import Boundary, BoundaryName
from cutlayer.privacy.mechanism import MECHANISMS
from cutlayer.privacy.run_privacy import open_run_privacy
from cutlayer.wire.codec import get_codec

CHILD = """
    import sys
    from pathlib import Path
    import torch
    from cutlayer.model.rows import Rows
    from cutlayer.privacy.boundary import Boundary, BoundaryName
    from cutlayer.privacy.mechanism import MECHANISMS
    from cutlayer.privacy.run_privacy import open_run_privacy
    from cutlayer.wire.codec import get_codec

    class Wire:
        def encode(self, x):
            packed = get_codec("raw").encode(x)
            if STOP:
                print("encoding", flush=True)
                sys.stdin.read()
            return packed

    torch.set_num_threads(1)
    FIRST, STOP = int(sys.argv[2]), sys.argv[3] == "stop"
    run = open_run_privacy(Path(sys.argv[1]), "run-1")
    rule = MECHANISMS.make("gaussian", 0.5)
    gate = Boundary(BoundaryName.ACTIVATIONS, rule, Wire(), run.ledger, run.secret)
    for step in range(FIRST, 1_000_000):
        h = torch.full((2, 8), float(step))
        _, released = gate.release(h, Rows(lengths=(2,)), [f"row-{step}"], "base")
        print(step, bytes(released.packed.buffers[0]).hex(), flush=True)
"""


def start_child(folder: Path, first: int, mode: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(CHILD), str(folder), str(first), mode],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )


def kill(child: subprocess.Popen[str]) -> str:
    child.send_signal(signal.SIGKILL)
    assert child.stdout is not None
    assert child.stdin is not None
    rest = child.stdout.read()
    child.stdout.close()
    child.stdin.close()
    assert child.wait(timeout=30) == -signal.SIGKILL
    return rest


def release_again(folder: Path, step: int) -> tuple[str, bool]:
    """The bytes of a step's release in a new process' place, and whether it was a replay."""
    with open_run_privacy(folder, "run-1") as run:
        rule = MECHANISMS.make("gaussian", 0.5)
        codec = get_codec("raw")
        gate = Boundary(BoundaryName.ACTIVATIONS, rule, codec, run.ledger, run.secret)
        h_ND = torch.full((2, 8), float(step))
        _, released = gate.release(h_ND, Rows(lengths=(2,)), [f"row-{step}"], "base")
        return bytes(released.packed.buffers[0]).hex(), released.is_replay


def num_lines(folder: Path) -> int:
    with open_run_privacy(folder, "run-1") as run:
        return run.ledger.summary().num_lines


def test_a_client_killed_between_ledger_and_frame_has_counted_the_release(tmp_path: Path):
    child = start_child(tmp_path / "run", 0, "stop")
    assert child.stdout is not None
    assert child.stdout.readline() == "encoding\n"
    # It stands after the ledger and before `release` returned: nothing can have left.
    kill(child)
    assert num_lines(tmp_path / "run") == 1
    assert release_again(tmp_path / "run", 0)[1]
    assert num_lines(tmp_path / "run") == 1


@pytest.mark.parametrize("seed", range(3))
def test_whatever_left_a_killed_client_is_in_the_ledger(tmp_path: Path, seed: int):
    folder = tmp_path / "run"
    child = start_child(folder, 0, "run")
    assert child.stdout is not None
    lines = [child.stdout.readline()]
    time.sleep(random.Random(seed).uniform(0.0, 0.05))
    lines += kill(child).splitlines(keepends=True)
    left = [line.split() for line in lines if line.endswith("\n")]
    assert left
    # At most the one release that the kill interrupted is counted beyond what left.
    assert len(left) <= num_lines(folder) <= len(left) + 2
    for step, wire in (left[0], left[-1]):
        assert release_again(folder, int(step)) == (wire, True)
