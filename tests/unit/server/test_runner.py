"""Requests that share a call: who waits for whom, and whose failure is whose."""

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager

import pytest
import torch

from cutlayer.errors import ProtocolError
from cutlayer.server.batches import Failure, Joint, JointWork, TrunkCall, TrunkResult
from cutlayer.server.runner import Runner
from cutlayer.server.scheduler import BatchScheduler, WorkKind
from cutlayer.server.settings import BatchSettings
from cutlayer.wire.messages import Backward

NOBODY = torch.zeros(1, 1)


class _Trunk:
    """Answers with the number of its call, and remembers who was in it."""

    def __init__(self) -> None:
        self.calls: list[list[str]] = []

    def compute(self, calls: Sequence[TrunkCall]) -> list[TrunkResult | Failure]:
        self.calls.append([call.owner for call in calls])
        bad = ProtocolError("bad rows")
        return [
            bad if call.owner == "bad" else TrunkResult(tensor=None, trunk_sq_norm=len(self.calls))
            for call in calls
        ]

    def work(self, client: str, joint: Joint | None = None) -> JointWork[float | None]:
        header = Backward(run_id="run", step=1, micro=0, is_last=True)
        return JointWork(
            kind=WorkKind.BACKWARD,
            prepare=lambda: TrunkCall(owner=client, header=header, tensor=NOBODY),
            compute=self.compute,
            finish=lambda result: result.trunk_sq_norm,
            joint=lambda: joint or Joint(graph=1, owners=frozenset({"a", "b"})),
        )


@contextmanager
def _running(window_ms: float) -> Iterator[tuple[Runner, _Trunk]]:
    runner = Runner(BatchScheduler(BatchSettings(backward_window_ms=window_ms)))
    try:
        yield runner, _Trunk()
    finally:
        runner.close()


def _ask(runner: Runner, trunk: _Trunk, client: str) -> "Future[float | None]":
    return runner.submit(client, 1, trunk.work(client))


def _while_busy(runner: Runner, submit: Callable[[], None]) -> None:
    gate, begun = threading.Event(), threading.Event()

    def block() -> None:
        begun.set()
        gate.wait(5)

    runner.submit("", 0, block)
    assert begun.wait(5)
    submit()
    gate.set()


def test_members_of_one_graph_share_a_call_as_soon_as_all_are_there() -> None:
    with _running(window_ms=60_000) as (runner, trunk):
        first = _ask(runner, trunk, "a")
        second = _ask(runner, trunk, "b")
        assert first.result(5) == second.result(5) == 1
    assert sorted(trunk.calls[0]) == ["a", "b"]


def test_silent_member_is_waited_for_only_a_window() -> None:
    with _running(window_ms=30) as (runner, trunk):
        runner.arrive("b")
        assert _ask(runner, trunk, "a").result(5) == 1
        assert _ask(runner, trunk, "b").result(5) == 2
    assert trunk.calls == [["a"], ["b"]]


def test_member_whose_last_connection_ends_is_not_waited_for() -> None:
    with _running(window_ms=60_000) as (runner, trunk):
        for _ in range(2):
            runner.arrive("b")
        waiting = _ask(runner, trunk, "a")
        runner.leave("b")
        with pytest.raises(TimeoutError):
            waiting.result(0.1)
        runner.leave("b")
        assert waiting.result(5) == 1


def test_member_that_comes_back_is_waited_for_again() -> None:
    with _running(window_ms=60_000) as (runner, trunk):
        runner.arrive("b")
        runner.leave("b")
        runner.arrive("b")
        waiting = _ask(runner, trunk, "a")
        with pytest.raises(TimeoutError):
            waiting.result(0.1)
        assert _ask(runner, trunk, "b").result(5) == waiting.result(5) == 1


def test_failure_of_one_in_a_call_is_not_the_others() -> None:
    everybody = Joint(graph=1, owners=frozenset({"a", "bad", "unreadable"}))

    def unreadable() -> TrunkCall:
        raise ProtocolError("cannot be decoded")

    with _running(window_ms=60_000) as (runner, trunk):
        futures = {
            name: runner.submit(name, 1, trunk.work(name, everybody)) for name in ("a", "bad")
        }
        broken = JointWork(
            kind=WorkKind.BACKWARD,
            prepare=unreadable,
            compute=trunk.compute,
            finish=lambda result: result.trunk_sq_norm,
            joint=lambda: everybody,
        )
        futures["unreadable"] = runner.submit("unreadable", 1, broken)
        assert futures["a"].result(5) == 1
        with pytest.raises(ProtocolError, match="bad rows"):
            futures["bad"].result(5)
        with pytest.raises(ProtocolError, match="decoded"):
            futures["unreadable"].result(5)
    assert sorted(trunk.calls[0]) == ["a", "bad"]


def test_fault_of_ours_is_told_to_everybody_in_the_call() -> None:
    def fail(calls: Sequence[TrunkCall]) -> list[TrunkResult | Failure]:
        raise ZeroDivisionError

    with _running(window_ms=60_000) as (runner, trunk):
        trunk.compute = fail  # type: ignore[method-assign]
        for future in [_ask(runner, trunk, "a"), _ask(runner, trunk, "b")]:
            with pytest.raises(ZeroDivisionError):
                future.result(5)


def test_request_of_a_closed_connection_is_not_computed() -> None:
    with _running(window_ms=60_000) as (runner, trunk):
        futures: list[Future[float | None]] = []

        def submit() -> None:
            futures.extend(_ask(runner, trunk, name) for name in ("a", "b"))
            futures[1].cancel()
            runner.arrive("b")
            runner.leave("b")

        _while_busy(runner, submit)
        assert futures[0].result(5) == 1
    assert trunk.calls == [["a"]]
