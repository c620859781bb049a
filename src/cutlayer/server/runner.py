"""The one thread that runs the trunk: requests wait here, the scheduler picks, the thread computes.

It does not know frames, runs or sessions: a request is a function, or a `JointWork` that may share
a call with others, and what a scheduler may know.
"""

import logging
import math
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Generic, TypeVar

from cutlayer.errors import TransportError
from cutlayer.server.batches import (
    Failure,
    Joint,
    JointWork,
    TrunkCall,
    TrunkResult,
    joined,
)
from cutlayer.server.scheduler import Choice, Scheduler, Waiting, WorkKind

__all__ = ["Runner"]

_LONGEST_CALL_S = 60.0
_CHORE_EVERY_S = 5.0

T = TypeVar("T")

_log = logging.getLogger(__name__)


@dataclass
class _Request(Generic[T]):
    client: str
    arrived_s: float
    num_tokens: int
    work: "Callable[[], T] | JointWork[T]"
    future: "Future[T]"
    call: TrunkCall | None = None
    results: list[TrunkResult] = field(default_factory=list)
    """Of the pieces that have been computed."""
    num_done: int = 0
    """Tokens of those pieces."""

    def seen(self, gone: set[str]) -> Waiting:
        """What the scheduler may know; clients that are gone are not worth waiting for."""
        joint, kind = Joint(), WorkKind.OTHER
        if isinstance(self.work, JointWork):
            joint, kind = self.work.joint(), self.work.kind
        return Waiting(
            client=self.client,
            arrived_s=self.arrived_s,
            num_tokens=self.num_tokens - self.num_done,
            kind=kind,
            has_begun=self.num_done > 0,
            graph=joint.graph,
            expected=joint.owners - gone,
        )

    def begin(self, num_tokens: int) -> bool:
        """Whether to compute: until its last piece begins, the connection may still cancel it."""
        is_last = self.num_done + num_tokens >= self.num_tokens
        if self.future.cancelled() or (is_last and not self.future.set_running_or_notify_cancel()):
            self.drop()
            return False
        return True

    def answer(self, work: Callable[[], T]) -> None:
        try:
            result = work()
        except BaseException as error:  # the waiting connection answers with it
            self.fail(error)
        else:
            self.future.set_result(result)

    def fail(self, error: BaseException) -> None:
        self.drop()
        if self.future.running() or self.future.set_running_or_notify_cancel():
            self.future.set_exception(error)

    def drop(self) -> None:
        """Nothing more will be computed of what has begun."""
        if isinstance(self.work, JointWork) and self.call is not None:
            self.work.abandon()

    def prepare(self, num_tokens: int) -> TrunkCall | None:
        """The call of the next tokens; None if it failed and was answered."""
        assert isinstance(self.work, JointWork)
        try:
            if self.call is None:
                self.call = self.work.prepare()
        except BaseException as error:  # as above
            self.fail(error)
            return None
        end = self.num_done + num_tokens
        if not self.num_done and end == self.num_tokens:
            return self.call
        return replace(self.call, begin=self.num_done, end=end)

    def take(self, num_tokens: int, result: "TrunkResult | Failure") -> bool:
        """Keep one piece's result, or end; whether there is more to do."""
        if isinstance(result, BaseException):
            self.fail(result)
            return False
        self.results.append(result)
        self.num_done += num_tokens
        if self.num_done < self.num_tokens:
            return True
        assert isinstance(self.work, JointWork)
        self.answer(partial(self.work.finish, joined(self.results)))
        return False


_Share = tuple[_Request[object], int]
"""A request and how many of its tokens are computed now."""


class Runner:
    """Owns the accelerator: nothing else calls the trunk."""

    def __init__(
        self,
        scheduler: Scheduler,
        clock: Callable[[], float] = time.monotonic,
        chore: Callable[[], None] | None = None,
        chore_every_s: float = _CHORE_EVERY_S,
    ) -> None:
        """Args:
        scheduler: chooses the next call.
        clock: seconds.
        chore: done between two calls now and then, also when nobody asks for anything.
        chore_every_s: how often.
        """
        self._scheduler = scheduler
        self._clock = clock
        self._chore = chore
        self._chore_every_s = chore_every_s
        self._chore_due_s = clock() + chore_every_s if chore else math.inf
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
        """Requests that have not ended and are not being computed."""
        return len(self._waiting)

    def close(self) -> None:
        """Finish the call that runs, refuse those that wait, end the thread."""
        with self._changed:
            self._is_closing = True
            waiting, self._waiting = self._waiting, []
            self._changed.notify()
        _refuse(waiting)
        self._thread.join(_LONGEST_CALL_S)

    def _loop(self) -> None:
        while (batch := self._next_batch()) is not None:
            if self._clock() >= self._chore_due_s:
                self._do_chore()
            running = [(request, n) for request, n in batch if request.begin(n)]
            self._put_back(_run(running) if running else [])

    def _do_chore(self) -> None:
        assert self._chore is not None
        self._chore_due_s = self._clock() + self._chore_every_s
        try:
            self._chore()
        except BaseException:  # a fault of ours: without this thread nobody is ever answered
            _log.exception("a chore of the trunk's thread failed")

    def _has_work(self) -> bool:
        """Whether a call waits whose connection is still there."""
        for request in self._waiting:
            if request.future.cancelled():
                request.drop()
        self._waiting = [r for r in self._waiting if not r.future.cancelled()]
        return bool(self._waiting)

    def _next_batch(self) -> list[_Share] | None:
        """What to compute now, nothing when the chore is due, None at the end."""
        with self._changed:
            while not self._is_closing:
                now_s = self._clock()
                if now_s >= self._chore_due_s:
                    return []
                until_s = self._chore_due_s
                if self._has_work():
                    seen = [request.seen(self._gone) for request in self._waiting]
                    choice = self._scheduler.next_batch(seen, now_s)
                    if choice.indices:
                        return self._taken(choice)
                    until_s = min(until_s, choice.wait_until_s)
                wait_s = None if until_s == math.inf else max(0.0, until_s - now_s)
                self._changed.wait(wait_s)
        return None

    def _taken(self, choice: Choice) -> list[_Share]:
        pairs = zip(choice.indices, choice.num_tokens, strict=True)
        batch = [(self._waiting[index], num_tokens) for index, num_tokens in pairs]
        for index in sorted(choice.indices, reverse=True):
            del self._waiting[index]
        return batch

    def _put_back(self, requests: Sequence[_Request[object]]) -> None:
        """Requests with more to do stay before all that their clients asked later."""
        with self._changed:
            if not self._is_closing:
                self._waiting[:0] = requests
                return
        _refuse(requests)


def _refuse(requests: Sequence[_Request[object]]) -> None:
    for request in requests:
        request.fail(TransportError("the server is shutting down"))


def _run(batch: Sequence[_Share]) -> list[_Request[object]]:
    """Compute together; who has tokens left."""
    first = batch[0][0]
    if not isinstance(first.work, JointWork):
        first.answer(first.work)
        return []
    prepared = [(request, n, request.prepare(n)) for request, n in batch]
    ready = [(request, n, call) for request, n, call in prepared if call is not None]
    if not ready:
        return []
    try:
        results = first.work.compute([call for _, _, call in ready])
    except BaseException as error:  # a fault of ours: every one of them is told
        for request, _, _ in ready:
            request.fail(error)
        return []
    pairs = zip(ready, results, strict=True)
    return [request for (request, n, _), result in pairs if request.take(n, result)]
