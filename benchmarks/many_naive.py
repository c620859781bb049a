"""The naive baseline with several clients: one step of each in turn, each behind its own link.

It does not know cutlayer's own client or server, nor which thread setting is the fastest.
"""

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType

from benchmarks.link import LinkProfile
from benchmarks.many_links import Links
from benchmarks.naive import NaiveRequest, NaiveServer, NaiveTraining
from benchmarks.workers import WorkerGroup

__all__ = ["NaiveFederation"]

MASK_FORM = "dense-s"


class NaiveFederation:
    """A naive server and its clients, each with a process and a link of its own.

    Args:
        model_folder: plain transformers model folder.
        lower: first block of the trunk.
        upper: one past its last block.
        link: of every client.
        count: clients.
    """

    def __init__(
        self,
        model_folder: Path,
        lower: int,
        upper: int,
        link: LinkProfile,
        count: int,
    ) -> None:
        self._model_folder, self._lower, self._upper = model_folder, lower, upper
        with ExitStack() as stack:
            server = stack.enter_context(
                NaiveServer(model_folder, lower, upper, 1, num_clients=count)
            )
            self.links = stack.enter_context(Links(server.port, link, count))
            self._group = stack.enter_context(WorkerGroup("benchmarks.naive", count, 1))
            self._stack = stack.pop_all()

    def round_seconds(
        self, rows: Sequence[list[list[int]]], steps: int, num_threads: int
    ) -> tuple[float, ...]:
        """Seconds in which every client takes one step, for each of `steps`; the first warms up.

        Args:
            rows: of every client, the same ones in each of its steps.
            steps: of every client.
            num_threads: torch threads of each process; only one of them computes at a time.
        """
        for worker, port, own in zip(self._group.workers, self.links.ports, rows, strict=True):
            worker.send(self._request(port, own, steps, num_threads))
        done = [worker.result(NaiveTraining) for worker in self._group.workers]
        return tuple(sum(one.seconds[step] for one in done) for step in range(steps))

    def __enter__(self) -> "NaiveFederation":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stack.close()

    def _request(
        self, port: int, rows: list[list[int]], steps: int, num_threads: int
    ) -> NaiveRequest:
        return NaiveRequest(
            port=port,
            model_folder=str(self._model_folder),
            lower=self._lower,
            upper=self._upper,
            rows=rows,
            mask_form=MASK_FORM,
            steps=steps,
            num_threads=num_threads,
        )
