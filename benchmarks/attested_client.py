"""Several clients in one process that take turns after every step, so that noise meets all alike.

Each trains with a server of its own. It does not compare or print.
"""

import os
import tempfile
import threading
import time

import msgspec

from benchmarks.isolate import answer, read_request
from benchmarks.split import SplitRequest, client_settings, new_trainer
from cutlayer import Client
from cutlayer.client.train import Report

__all__ = ["Answer", "Request", "main"]


class Request(msgspec.Struct, frozen=True, kw_only=True):
    """One training per client; all have as many steps."""

    clients: list[SplitRequest]


class Answer(msgspec.Struct, frozen=True, kw_only=True):
    """Seconds of each step, by client."""

    seconds: list[list[float]]


class _Turns:
    """One of several threads runs at a time. The order is another one in each round, so that none
    always follows the same other one."""

    def __init__(self, num: int, num_rounds: int) -> None:
        self._may_run = [threading.Semaphore(0) for _ in range(num)]
        self._order = [(n + round_) % num for round_ in range(num_rounds) for n in range(num)]
        self._next = 0
        self.hand_over()

    def wait(self, index: int) -> None:
        """Until it is this one's turn."""
        self._may_run[index].acquire()

    def hand_over(self) -> None:
        """To the next one."""
        if self._next < len(self._order):
            self._may_run[self._order[self._next]].release()
        self._next += 1


def _train(request: SplitRequest, index: int, turns: _Turns) -> list[float]:
    seconds: list[float] = []
    turns.wait(index)
    with (
        tempfile.TemporaryDirectory() as folder,
        Client(client_settings(request, folder)) as client,
    ):
        began_s = time.perf_counter()

        def on_step(report: Report) -> None:
            nonlocal began_s
            seconds.append(time.perf_counter() - began_s)
            turns.hand_over()
            turns.wait(index)
            began_s = time.perf_counter()

        new_trainer(client, request).run(on_step)
    turns.hand_over()
    return seconds


def _end_all(failed: threading.ExceptHookArgs) -> None:
    """The others would wait for the turn of one that failed."""
    threading.__excepthook__(failed)
    os._exit(1)


def main() -> None:
    """Train as the request on stdin says."""
    threading.excepthook = _end_all
    request = read_request(Request)
    # To its first step, from step to step, and to its end.
    turns = _Turns(len(request.clients), request.clients[0].steps + 1)
    found: list[list[float]] = [[] for _ in request.clients]

    def train(index: int) -> None:
        found[index] = _train(request.clients[index], index, turns)

    threads = [threading.Thread(target=train, args=(i,)) for i in range(len(request.clients))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    answer(Answer(seconds=found))


if __name__ == "__main__":
    main()
