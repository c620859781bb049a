"""The one thread that runs the trunk: requests wait here, the scheduler picks, the thread computes.

It does not know frames, runs or sessions: a request is a function, or a `JointWork` that may share
a call with others, and what a scheduler may know.
"""

import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from typing import Generic, TypeVar

from cutlayer.errors import TransportError
from cutlayer.server.batches import Joint, JointWork, TrunkCall
from cutlayer.server.scheduler import Scheduler, Waiting, WorkKind

__all__ = ["Runner"]

_LONGEST_CALL_S = 60.0

T = TypeVar("T")


@dataclass
class _Request(Generic[T]):
    client: str
    arrived_s: float
    num_tokens: int
    work: "Callable[[], T] | JointWork[T]"
    future: "Future[T]"
    call: TrunkCall | None = None

    def seen(self, gone: set[str]) -> Waiting:
        """What the scheduler may know; clients that are gone are not worth waiting for."""
        joint, kind = Joint(), WorkKind.OTHER
        if isinstance(self.work, JointWork):
            joint, kind = self.work.joint(), self.work.kind
        return Waiting(
            client=self.client,
            arrived_s=self.arrived_s,
            num_tokens=self.num_tokens,
            kind=kind,
            graph=joint.graph,
            expected=joint.owners - gone,
        )

    def answer(self, work: Callable[[], T]) -> None:
        try:
            self.future.set_result(work())
        except BaseException as error:  # the waiting connection answers with it
            self.future.set_exception(error)

    def prepare(self) -> bool:
        """Make the call ready; false if it failed and was answered."""
        assert isinstance(self.work, JointWork)
        try:
            self.call = self.work.prepare()
        except BaseException as error:  # as above
            self.future.set_exception(error)
            return False
        return True


class Runner:
    """Owns the accelerator: nothing else calls the trunk."""

    def __init__(self, scheduler: Scheduler, clock: Callable[[], float] = time.monotonic) -> None:
        self._scheduler = scheduler
        self._clock = clock
        self._waiting: list[_Request[object]] = []
        self._changed = threading.Condition()
        self._is_closing = False
        self._connections: Counter[str] = Counter()
        self._gone: set[str] = set()
        self._thread = threading.Thread(target=self._loop, name="trunk-runner", daemon=True)
        self._thread.start()

    def submit(
        self, client: str, num_tokens: int, work: "Callable[[], T] | JointWork[T]"
    ) -> "Future[T]":
        """Queue work for the trunk; it runs when the scheduler chooses it.

        Raises:
            TransportError: the server is shutting down.
        """
        future: Future[T] = Future()
        request = _Request(client, self._clock(), num_tokens, work, future)
        with self._changed:
            if self._is_closing:
                raise TransportError("the server is shutting down; try again later")
            self._waiting.append(request)  # type: ignore[arg-type]
            self._changed.notify()
        return future

    def arrive(self, client: str) -> None:
        """A client has one connection more."""
        with self._changed:
            self._connections[client] += 1
            self._gone.discard(client)

    def leave(self, client: str) -> None:
        """A client has one connection less; without any, nobody waits for it."""
        with self._changed:
            self._connections[client] -= 1
            if self._connections[client] <= 0:
                del self._connections[client]
                self._gone.add(client)
            self._changed.notify()

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
            running = [r for r in batch if r.future.set_running_or_notify_cancel()]
            if running:
                _run(running)

    def _has_work(self) -> bool:
        """Whether a call waits whose connection is still there."""
        self._waiting = [r for r in self._waiting if not r.future.cancelled()]
        return bool(self._waiting)

    def _next_batch(self) -> list[_Request[object]]:
        with self._changed:
            while True:
                self._changed.wait_for(lambda: self._has_work() or self._is_closing)
                if not self._waiting:
                    return []
                now_s = self._clock()
                seen = [request.seen(self._gone) for request in self._waiting]
                choice = self._scheduler.next_batch(seen, now_s)
                if choice.indices:
                    return self._taken(choice.indices)
                self._changed.wait(max(0.0, choice.wait_until_s - now_s))

    def _taken(self, indices: Sequence[int]) -> list[_Request[object]]:
        batch = [self._waiting[index] for index in indices]
        for index in sorted(indices, reverse=True):
            del self._waiting[index]
        return batch


def _run(requests: Sequence[_Request[object]]) -> None:
    work = requests[0].work
    if not isinstance(work, JointWork):
        requests[0].answer(work)
        return
    ready = [request for request in requests if request.prepare()]
    if not ready:
        return
    try:
        results = work.compute([request.call for request in ready if request.call is not None])
    except BaseException as error:  # a fault of ours: every one of them is told
        for request in ready:
            request.future.set_exception(error)
        return
    for request, result in zip(ready, results, strict=True):
        if isinstance(result, BaseException):
            request.future.set_exception(result)
        else:
            assert isinstance(request.work, JointWork)
            request.answer(partial(request.work.finish, result))
