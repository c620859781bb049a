"""What a second replica adds: two on one core each, against one on one core with half of the work.

One client's frames are recorded once. Then each replica is fed them by a process on the replica's
own core: alone, and both at once. Efficiency is throughput of both over twice that of one; what it
loses is what replicas have in common: memory, caches, the front. It does not measure clients.
"""

import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
from transformers import AutoConfig

from benchmarks.replica_feeder import FeedRequest, FeedResult
from benchmarks.report import Arguments, emit, median, parse_arguments, print_table, spread
from benchmarks.subjects import write_small_llama, write_tiny_llama
from benchmarks.workers import Worker, WorkerGroup
from cutlayer import ServerSettings
from cutlayer.identity.provision import LocalFolders, local, member_files
from cutlayer.server.front import TrunkFront
from cutlayer.settings import parse_settings

__all__ = ["replica_efficiency"]

_OWNERS = ("first", "second")


@dataclass(frozen=True, kw_only=True)
class Load:
    """What is recorded and fed."""

    model: Path
    lower: int
    upper: int
    vocab_size: int
    rows: int
    length: int
    steps: int
    repeats: int


@dataclass(frozen=True, kw_only=True)
class Throughput:
    """Tokens per second, one figure per repeat."""

    alone: tuple[float, ...]
    """One replica; the mean of the two cores, each alone."""
    both: tuple[float, ...]
    """Two replicas at once, together."""
    cpu_alone: tuple[float, ...]
    """CPU seconds of replica and feeder per thousand tokens: whatever else the machine does."""
    cpu_both: tuple[float, ...]

    @property
    def efficiencies(self) -> list[float]:
        """Share of twice one replica's throughput that two have, per repeat."""
        return [both / (2 * alone) for both, alone in zip(self.both, self.alone, strict=True)]


def replica_efficiency(arguments: Arguments) -> Throughput:
    """Measure; `median(result.efficiencies)` is the figure.

    Raises:
        RuntimeError: fewer than two cores.
    """
    cores = sorted(os.sched_getaffinity(0))[:2]
    if len(cores) < 2:
        raise RuntimeError("two replicas on one core each need two cores")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        load, kits = _load(arguments, folder), local(folder / "kits", names=_OWNERS)
        with _front(load, kits, folder) as front, WorkerGroup(_FEEDER, 2, 1) as group:
            feeders = _Feeders(front, group.workers, kits, cores, folder / "recording")
            feeders.record(load)
            return feeders.measure(load.repeats)


def main() -> None:
    """Print a table and one JSON line."""
    arguments = parse_arguments(__doc__ or "")
    found = replica_efficiency(arguments)
    print_table(
        "tokens/s of the trunk, forward and backward",
        ("replicas", "median (least to most)"),
        [
            ("1, on one core, half of the frames", spread(found.alone)),
            ("2, on one core each, all frames", spread(found.both)),
        ],
    )
    result: dict[str, bool | int | float | str | None] = {
        "replica_efficiency": round(median(found.efficiencies), 4),
        "replica_efficiency_least": round(min(found.efficiencies), 4),
        "replica_cpu_efficiency": round(median(found.cpu_alone) / median(found.cpu_both), 4),
        "replica_tokens_per_s_1": round(median(found.alone), 1),
        "replica_tokens_per_s_2": round(median(found.both), 1),
        "profile": arguments.profile,
    }
    emit(result, arguments)


_FEEDER = "benchmarks.replica_feeder"


class _Feeders:
    """Two client processes, each with a replica and a core of its own."""

    def __init__(
        self,
        front: TrunkFront,
        workers: Sequence[Worker],
        kits: LocalFolders,
        cores: Sequence[int],
        recording: Path,
    ) -> None:
        self._front = front
        self._workers = list(workers)
        self._requests = [
            FeedRequest(
                address=f"localhost:{front.port}",
                kit=str(kits.clients[name]),
                recording=str(recording),
                core=core,
            )
            for name, core in zip(_OWNERS, cores, strict=True)
        ]

    def record(self, load: Load) -> None:
        """Let the first client train for real; the replicas get their cores."""
        for replica, request in zip(self._front.replicas(), self._requests, strict=True):
            assert replica.pid is not None
            assert request.core is not None
            _pin(replica.pid, request.core)
        first = self._requests[0]
        request = FeedRequest(
            address=first.address,
            kit=first.kit,
            recording=first.recording,
            model_folder=str(load.model),
            lower=load.lower,
            upper=load.upper,
            rows=load.rows,
            length=load.length,
            vocab_size=load.vocab_size,
            steps=load.steps,
        )
        self._run([self._workers[0]], [request])

    def measure(self, num_repeats: int) -> Throughput:
        """Alone and together, turn by turn, after a first turn that warms up."""
        alone, both = [], []
        for _ in range(num_repeats + 1):
            single = [
                self._run([worker], [request])
                for worker, request in zip(self._workers, self._requests, strict=True)
            ]
            alone.append(_mean(single))
            together = self._run(self._workers, self._requests)
            both.append((together.tokens_per_s, together.cpu_s_per_1000))
        return Throughput(
            alone=tuple(speed for speed, _ in alone[1:]),
            both=tuple(speed for speed, _ in both[1:]),
            cpu_alone=tuple(cpu for _, cpu in alone[1:]),
            cpu_both=tuple(cpu for _, cpu in both[1:]),
        )

    def _run(self, workers: list[Worker], requests: list[FeedRequest]) -> "_Turn":
        for worker, request in zip(workers, requests, strict=True):
            worker.send(request)
        for worker in workers:
            worker.expect_ready()
        used_s = self._cpu_s()
        for worker in workers:
            worker.go()
        results = [worker.result(FeedResult) for worker in workers]
        assert len({result.place for result in results}) == len(results), "clients share a replica"
        num_tokens = sum(one.num_tokens for one in results)
        return _Turn(
            # They began together; the slowest ends it.
            tokens_per_s=num_tokens / max(one.seconds for one in results),
            cpu_s_per_1000=1000 * (self._cpu_s() - used_s) / num_tokens,
        )

    def _cpu_s(self) -> float:
        """Of all replicas and feeders so far; who is idle adds nothing."""
        pids = [replica.pid for replica in self._front.replicas()]
        pids += [worker.pid for worker in self._workers]
        times = [psutil.Process(pid).cpu_times() for pid in pids]
        return float(sum(one.user + one.system for one in times))


@dataclass(frozen=True, kw_only=True)
class _Turn:
    tokens_per_s: float
    cpu_s_per_1000: float


def _mean(turns: Sequence[_Turn]) -> tuple[float, float]:
    count = len(turns)
    return (
        sum(turn.tokens_per_s for turn in turns) / count,
        sum(turn.cpu_s_per_1000 for turn in turns) / count,
    )


def _load(arguments: Arguments, folder: Path) -> Load:
    if arguments.model is not None:
        model, rows, length = Path(arguments.model), 4, 128
    elif arguments.is_smoke:
        model, rows, length = write_tiny_llama(folder / "model"), 2, 16
    else:
        model, rows, length = write_small_llama(folder / "model"), 4, 128
    config = AutoConfig.from_pretrained(model)
    return Load(
        model=model,
        lower=1,
        upper=config.num_hidden_layers - 1,
        vocab_size=config.vocab_size,
        rows=rows,
        length=length,
        steps=4 if arguments.is_smoke else 8,
        repeats=2 if arguments.is_smoke else 5,
    )


@contextmanager
def _front(load: Load, kits: LocalFolders, folder: Path) -> Iterator[TrunkFront]:
    files = member_files(kits.server)
    table = {
        "model": {"path": str(load.model), "lower": load.lower, "upper": load.upper},
        "listen": {"address": "127.0.0.1:0", "tls": files.tls},
        "state": {"folder": str(folder / "state")},
        "replicas": {"count": 2, "threads": 1},
    }
    front = TrunkFront(parse_settings(ServerSettings, table, "benchmark front"))
    try:
        front.start()
        yield front
    finally:
        front.stop(grace_s=0)


def _pin(pid: int, core: int) -> None:
    """Keep a running process on one core; threads that it starts later inherit that."""
    for task in Path(f"/proc/{pid}/task").iterdir():
        os.sched_setaffinity(int(task.name), {core})


if __name__ == "__main__":
    main()
