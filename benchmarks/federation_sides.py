"""The sides of the federation benchmark: cutlayer with many clients, naive, unsplit, each timed.

It does not form ratios or print.
"""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from transformers import AutoConfig

from benchmarks.baselines import Timed, unsplit_training
from benchmarks.link import LINK_PROFILES
from benchmarks.many_clients import (
    ClientRun,
    run_in_turn,
    run_together,
    step_seconds,
    turn_seconds,
)
from benchmarks.many_links import Links
from benchmarks.report import median
from benchmarks.split import Setting, SplitRequest, SplitServer
from benchmarks.subjects import equal_rows
from benchmarks.unsplit import Training, UnsplitRequest
from benchmarks.workers import WorkerGroup, peak_bytes
from cutlayer.identity.provision import LocalFolders

__all__ = ["Case", "Measured", "Ours", "Subject", "subject", "unsplit"]

CODEC = "bf16"


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A model and its cut."""

    folder: Path
    vocab_size: int
    lower: int
    upper: int


@dataclass(frozen=True, kw_only=True)
class Case:
    """What every client does."""

    link: str
    """Key of `LINK_PROFILES`."""
    num_rows: int
    length: int
    """Tokens of every row."""
    steps: int
    warmup: int = 2

    @property
    def num_tokens(self) -> int:
        """Tokens of one step of one client."""
        return self.num_rows * self.length

    def rows(self, subject: Subject, count: int) -> list[list[list[int]]]:
        """Rows of each of `count` clients; the same ones for every side."""
        return [
            equal_rows(self.num_rows, self.length, subject.vocab_size, seed)
            for seed in range(count)
        ]


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One side in one case."""

    name: str
    seconds: tuple[float, ...]
    """In which every client takes one step; several figures of one run."""
    threads: str
    client_peak_bytes: int = 0
    server_peak_bytes: int = 0
    bytes_up_per_token: float = 0.0
    """At the socket, with handshakes."""
    bytes_down_per_token: float = 0.0

    @property
    def median_s(self) -> float:
        """The figure that ratios are made of."""
        return median(self.seconds)


class Ours:
    """A running trunk server, a link for each client, and the client processes.

    Args:
        model: what is trained, by every client with an adapter of its own.
        kits: certificates; one owner for each client.
        group: processes of `benchmarks.many_clients`; they outlive the server.
        server_threads: torch threads of the server.
        extra: more sections of the server's settings.
    """

    def __init__(
        self,
        model: Subject,
        kits: LocalFolders,
        group: WorkerGroup,
        server_threads: int,
        extra: Mapping[str, Mapping[str, Setting]],
    ) -> None:
        self._model, self._kits, self._group = model, kits, group
        self._server_threads = server_threads
        with ExitStack() as stack:
            self._server = stack.enter_context(
                SplitServer(model.folder, model.lower, model.upper, kits, server_threads, extra)
            )
            self._links = stack.enter_context(
                Links(self._server.port, LINK_PROFILES["loopback"], len(group.workers))
            )
            self._stack = stack.pop_all()

    @property
    def num_clients(self) -> int:
        """Client processes."""
        return len(self._group.workers)

    def together(self, case: Case, count: int | None = None) -> Measured:
        """`count` clients (None: all) train at the same time."""
        count = self.num_clients if count is None else count
        before = self._set_link(case)
        runs = run_together(self._group, self._jobs(case, count))
        seconds = step_seconds(runs, case.warmup)
        return self._measured(case, runs, seconds, f"{count} clients together", 1, before)

    def in_turn(self, case: Case, num_threads: int) -> Measured:
        """One client after the other, one step of each in turn."""
        count = self.num_clients
        before = self._set_link(case)
        runs = run_in_turn(self._group, self._jobs(case, count), num_threads)
        seconds = turn_seconds(runs, case.warmup)
        return self._measured(case, runs, seconds, f"{count} clients in turn", num_threads, before)

    def __enter__(self) -> "Ours":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stack.close()

    def _set_link(self, case: Case) -> "tuple[int, int]":
        self._links.set_link(LINK_PROFILES[case.link])
        counted = self._links.counters()
        return counted.bytes_up, counted.bytes_down

    def _jobs(self, case: Case, count: int) -> list[SplitRequest]:
        owners = list(self._kits.clients.values())[:count]
        rows = case.rows(self._model, count)
        return [
            SplitRequest(
                address=f"127.0.0.1:{port}",
                model_folder=str(self._model.folder),
                lower=self._model.lower,
                upper=self._model.upper,
                kit=str(kit),
                codec=CODEC,
                rows=own,
                steps=case.steps,
            )
            for port, kit, own in zip(self._links.ports[:count], owners, rows, strict=True)
        ]

    def _measured(
        self,
        case: Case,
        runs: Sequence[ClientRun],
        seconds: tuple[float, ...],
        how: str,
        client_threads: int,
        before: "tuple[int, int]",
    ) -> Measured:
        counted = self._links.counters()
        num_tokens = case.num_tokens * case.steps * len(runs)
        return Measured(
            name=f"cutlayer, {how}",
            seconds=seconds,
            threads=f"{client_threads} + {self._server_threads}",
            client_peak_bytes=max(run.peak_bytes for run in runs),
            server_peak_bytes=peak_bytes(self._server.pid),
            bytes_up_per_token=(counted.bytes_up - before[0]) / num_tokens,
            bytes_down_per_token=(counted.bytes_down - before[1]) / num_tokens,
        )


def subject(folder: Path, depth: int) -> Subject:
    """A model, cut `depth` blocks from each end."""
    config = AutoConfig.from_pretrained(folder)
    return Subject(
        folder=folder,
        vocab_size=config.vocab_size,
        lower=depth,
        upper=config.num_hidden_layers - depth,
    )


def unsplit(model: Subject, case: Case, count: int, num_threads: int, steps: int) -> Measured:
    """Transformers and PEFT in one process, on the rows of all clients together.

    Each client's rows are one forward and backward, and one optimizer step follows on all of them.
    """
    rows = [row for own in case.rows(model, count) for row in own]
    request = UnsplitRequest(
        model_folder=str(model.folder), rows=rows, steps=steps, micro_batch_rows=case.num_rows
    )
    timed: Timed[Training] = unsplit_training(request, num_threads)
    return Measured(
        name="unsplit PEFT", seconds=timed.details.seconds[1:], threads=str(num_threads)
    )
