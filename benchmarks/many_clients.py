"""Several owners train at the same time, or in turn, each as a process behind a link of its own.

As a module it is one such client: it answers `SplitRequest`s with `ClientRun`s (`workers`). It does
not compare, print or know the baselines.
"""

import tempfile
import time
from collections.abc import Sequence

import msgspec
import numpy as np
import torch

from benchmarks.isolate import answer
from benchmarks.split import SplitRequest, client_settings, new_trainer
from benchmarks.workers import WorkerGroup, mark, peak_bytes, requests, say_ready
from cutlayer import Client
from cutlayer.client.train import Report

__all__ = ["ClientJob", "ClientRun", "run_in_turn", "run_together", "step_seconds", "turn_seconds"]


class ClientJob(msgspec.Struct, frozen=True, kw_only=True):
    """What one client process is to measure."""

    request: SplitRequest
    is_in_turn: bool = False
    """Wait for the parent's `go` before every step."""
    num_threads: int = 1
    """Torch threads."""


class ClientRun(msgspec.Struct, frozen=True, kw_only=True):
    """What each step of one client took; times of the machine's monotonic clock."""

    begins_s: tuple[float, ...]
    ends_s: tuple[float, ...]
    losses: tuple[float, ...]
    cpu_s: float
    """Processor time of the process from its first step to its last."""
    peak_bytes: int


def run_together(
    group: WorkerGroup, jobs: Sequence[SplitRequest], num_threads: int = 1
) -> list[ClientRun]:
    """All clients begin at once and take their steps as fast as the server answers."""
    chosen = group.prepare([ClientJob(request=job, num_threads=num_threads) for job in jobs])
    for worker in chosen:
        worker.go()
    return [worker.result(ClientRun) for worker in chosen]


def run_in_turn(
    group: WorkerGroup, jobs: Sequence[SplitRequest], num_threads: int = 1
) -> list[ClientRun]:
    """One client after the other, one step of each in turn; nothing overlaps."""
    chosen = group.prepare(
        [ClientJob(request=job, is_in_turn=True, num_threads=num_threads) for job in jobs]
    )
    for _ in range(jobs[0].steps):
        for worker in chosen:
            worker.go()
            worker.expect_mark()
    for worker in chosen:
        worker.go()
    return [worker.result(ClientRun) for worker in chosen]


def step_seconds(runs: Sequence[ClientRun], warmup: int, num_pieces: int = 5) -> tuple[float, ...]:
    """Seconds in which the clients together take one step each, in steady state.

    Only the time counts in which every client works: from the end of the last warm-up step to the
    end of the first client's last step; or all of it where there is no such time. It is cut into
    pieces, for a median. A step that lies in two pieces counts in each by the share of its time.

    Args:
        runs: of all clients, made by `run_together`.
        warmup: first steps of each client to leave out; at least 1.
        num_pieces: how many figures to give.
    """
    begin_s = max(run.ends_s[warmup - 1] for run in runs)
    end_s = min(run.ends_s[-1] for run in runs)
    if end_s <= begin_s:
        # They never all worked at once: then all of it counts, which flatters nobody.
        begin_s = min(run.ends_s[warmup - 1] for run in runs)
        end_s, num_pieces = max(run.ends_s[-1] for run in runs), 1
    edges = np.linspace(begin_s, end_s, num_pieces + 1)
    steps = np.sum(
        [np.interp(edges, run.ends_s, np.arange(len(run.ends_s))) for run in runs], axis=0
    )
    return tuple(float(s) for s in np.diff(edges) * len(runs) / np.diff(steps))


def turn_seconds(runs: Sequence[ClientRun], warmup: int) -> tuple[float, ...]:
    """Seconds in which each client took one step, for every turn of `run_in_turn`."""
    return tuple(
        sum(run.ends_s[step] - run.begins_s[step] for run in runs)
        for step in range(warmup, len(runs[0].ends_s))
    )


class _Clock:
    """Notes when each step began and ended; what happens at a mark is in neither."""

    def __init__(self, is_in_turn: bool) -> None:
        self._is_in_turn = is_in_turn
        self.begins_s = [time.monotonic()]
        self.ends_s: list[float] = []
        self._first_cpu_s = time.process_time()
        self.cpu_s = 0.0

    def on_step(self, report: Report) -> None:
        self.ends_s.append(time.monotonic())
        self.cpu_s = time.process_time() - self._first_cpu_s
        if self._is_in_turn:
            mark()
        self.begins_s.append(time.monotonic())


def _measure(job: ClientJob) -> ClientRun:
    torch.set_num_threads(job.num_threads)
    with (
        tempfile.TemporaryDirectory() as folder,
        Client(client_settings(job.request, folder)) as client,
    ):
        trainer = new_trainer(client, job.request)
        client.trunk.hello()
        say_ready()
        clock = _Clock(job.is_in_turn)
        history = trainer.run(clock.on_step).history
    return ClientRun(
        begins_s=tuple(clock.begins_s[:-1]),
        ends_s=tuple(clock.ends_s),
        losses=tuple(record.loss for record in history),
        cpu_s=clock.cpu_s,
        peak_bytes=peak_bytes(),
    )


def main() -> None:
    """Answer requests until stdin is closed."""
    for job in requests(ClientJob):
        answer(_measure(job))


if __name__ == "__main__":
    main()
