"""The one thread that runs the trunk: requests wait here, the scheduler picks, the thread computes.

It does not know frames, runs or sessions: a request is a function and what a scheduler may know.
"""

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Generic, TypeVar

from cutlayer.errors import TransportError
from cutlayer.server.scheduler import Scheduler, Waiting

__all__ = ["Runner"]

_LONGEST_CALL_S = 60.0

T = TypeVar("T")


@dataclass
class _Request(Generic[T]):
    waiting: Waiting
    work: Callable[[], T]
    future: "Future[T]"

    def run(self) -> None:
        if not self.future.set_running_or_notify_cancel():
            return
        try:
            self.future.set_result(self.work())
        except BaseException as error:  # the waiting connection answers with it
            self.future.set_exception(error)


class Runner:
    """Owns the accelerator: nothing else calls the trunk."""

    def __init__(self, scheduler: Scheduler, clock: Callable[[], float] = time.monotonic) -> None:
        self._scheduler = scheduler
        self._clock = clock
        self._waiting: list[_Request[object]] = []
        self._changed = threading.Condition()
        self._is_closing = False
        self._thread = threading.Thread(target=self._loop, name="trunk-runner", daemon=True)
        self._thread.start()

    def submit(self, client: str, num_tokens: int, work: Callable[[], T]) -> "Future[T]":
        """Queue work for the trunk; it runs when the scheduler chooses it.

        Raises:
            TransportError: the server is shutting down.
        """
        future: Future[T] = Future()
        waiting = Waiting(client=client, arrived_s=self._clock(), num_tokens=num_tokens)
        with self._changed:
            if self._is_closing:
                raise TransportError("the server is shutting down; try again later")
            self._waiting.append(_Request(waiting, work, future))  # type: ignore[arg-type]
            self._changed.notify()
        return future

    @property
    def num_waiting(self) -> int:
        """Requests that have not begun."""
        return len(self._waiting)

    def close(self) -> None:
        """Finish the call that runs, refuse those that wait, end the thread."""
        with self._changed:
            self._is_closing = True
            waiting, self._waiting = self._waiting, []
            self._changed.notify()
        for request in waiting:
            if request.future.set_running_or_notify_cancel():
                request.future.set_exception(TransportError("the server is shutting down"))
        self._thread.join(_LONGEST_CALL_S)

    def _loop(self) -> None:
        while batch := self._next_batch():
            for request in batch:
                request.run()

    def _has_work(self) -> bool:
        """Whether a call waits whose connection is still there."""
        self._waiting = [r for r in self._waiting if not r.future.cancelled()]
        return bool(self._waiting)

    def _next_batch(self) -> list[_Request[object]]:
        with self._changed:
            self._changed.wait_for(lambda: self._has_work() or self._is_closing)
            if not self._waiting:
                return []
            chosen = self._scheduler.next_batch([r.waiting for r in self._waiting], self._clock())
            batch = [self._waiting[index] for index in chosen]
            for index in sorted(chosen, reverse=True):
                del self._waiting[index]
            return batch
