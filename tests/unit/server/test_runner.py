"""Requests that share a call: who waits for whom, and whose failure is whose."""

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager

import pytest
import torch

from cutlayer.errors import ProtocolError, TransportError
from cutlayer.server.batches import Failure, Joint, JointWork, TrunkCall, TrunkResult
from cutlayer.server.runner import Runner
from cutlayer.server.scheduler import BatchScheduler, WorkKind
from cutlayer.server.settings import BatchSettings
from cutlayer.wire.messages import Backward, Decode

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


class _Pieces:
    """Answers a DECODE with the numbers of its tokens; notes pieces, endings and who is told."""

    def __init__(self) -> None:
        self.calls: list[list[tuple[str, range]]] = []
        self.abandoned: list[str] = []
        self.gate: threading.Event | None = None
        self.begun = threading.Event()
        self.fails_at: int | None = None

    def compute(self, calls: Sequence[TrunkCall]) -> list[TrunkResult | Failure]:
        self.calls.append([(call.owner, call.piece) for call in calls])
        self.begun.set()
        if self.gate is not None:
            assert self.gate.wait(5)
        return [self._result(call) for call in calls]

    def work(self, client: str, num_tokens: int) -> JointWork[list[float]]:
        header = Decode(session_id="s", rows=[0], lengths=[num_tokens], positions=[0])
        tensor = torch.arange(float(num_tokens))[:, None]

        def listed(result: TrunkResult) -> list[float]:
            assert result.tensor is not None
            return [float(value) for value in result.tensor[:, 0]]

        return JointWork(
            kind=WorkKind.DECODE,
            prepare=lambda: TrunkCall(owner=client, header=header, tensor=tensor),
            compute=self.compute,
            finish=listed,
            abandon=lambda: self.abandoned.append(client),
        )

    def _result(self, call: TrunkCall) -> TrunkResult | Failure:
        if self.fails_at in call.piece:
            return ProtocolError("bad piece")
        return TrunkResult(tensor=call.tensor[call.piece.start : call.piece.stop])


@contextmanager
def _chunked() -> Iterator[tuple[Runner, _Pieces]]:
    runner = Runner(BatchScheduler(BatchSettings(prefill_tokens=100, decode_patience=0)))
    try:
        yield runner, _Pieces()
    finally:
        runner.close()


def test_long_decode_is_computed_in_pieces_and_answered_once() -> None:
    with _chunked() as (runner, pieces):
        answer = runner.submit("a", 250, pieces.work("a", 250)).result(5)
    assert answer == list(range(250))
    assert [piece for call in pieces.calls for _, piece in call] == [
        range(100),
        range(100, 200),
        range(200, 250),
    ]
    assert pieces.abandoned == []


def test_step_of_another_client_is_answered_between_the_pieces() -> None:
    with _chunked() as (runner, pieces):
        pieces.gate = threading.Event()
        long = runner.submit("a", 1000, pieces.work("a", 1000))
        assert pieces.begun.wait(5)
        later = runner.submit("a", 1, pieces.work("a", 1))
        step = runner.submit("b", 1, pieces.work("b", 1))
        pieces.gate.set()
        assert step.result(5) == [0.0]
        assert len(long.result(5)) == 1000
        assert later.result(5) == [0.0]
    assert [owner for owner, _ in pieces.calls[1]] in (["b", "a"], ["a", "b"])
    # Calls of one client keep their order.
    assert pieces.calls[-1] == [("a", range(1))]


def test_long_decode_of_a_closed_connection_ends_after_its_piece() -> None:
    with _chunked() as (runner, pieces):
        pieces.gate = threading.Event()
        long = runner.submit("a", 1000, pieces.work("a", 1000))
        assert pieces.begun.wait(5)
        assert long.cancel()
        pieces.gate.set()
        assert runner.submit("b", 1, pieces.work("b", 1)).result(5) == [0.0]
        assert runner.num_waiting == 0
    assert pieces.calls == [[("a", range(100))], [("b", range(1))]]
    assert pieces.abandoned == ["a"]


def test_failure_of_a_piece_ends_the_request() -> None:
    with _chunked() as (runner, pieces):
        pieces.fails_at = 150
        with pytest.raises(ProtocolError, match="bad piece"):
            runner.submit("a", 1000, pieces.work("a", 1000)).result(5)
    assert len(pieces.calls) == 2
    assert pieces.abandoned == ["a"]


def test_closing_refuses_a_request_between_its_pieces() -> None:
    with _chunked() as (runner, pieces):
        pieces.gate = threading.Event()
        long = runner.submit("a", 1000, pieces.work("a", 1000))
        assert pieces.begun.wait(5)
        closing = threading.Thread(target=runner.close)
        closing.start()
        pieces.gate.set()
        with pytest.raises(TransportError, match="shutting down"):
            long.result(5)
        closing.join(5)
    assert pieces.abandoned == ["a"]


@pytest.mark.parametrize("error", [ProtocolError("ours"), OSError("disk"), KeyError("a bug")])
def test_chore_is_done_though_nobody_asks_for_anything(error: Exception) -> None:
    times, done = [], threading.Event()

    def chore() -> None:
        times.append(1)
        if len(times) == 1:
            raise error  # must not end the thread
        done.set()

    runner = Runner(BatchScheduler(BatchSettings()), chore=chore, chore_every_s=0.01)
    try:
        assert done.wait(5)
        assert runner.submit("a", 1, lambda: 7).result(5) == 7
    finally:
        runner.close()


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
