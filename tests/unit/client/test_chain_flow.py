"""Calls of a chain move on while one is waited for, in order, and failures stay where they are."""

import threading
from concurrent.futures import Future
from dataclasses import dataclass, field

from cutlayer.client.chain_flow import CallFlow
from cutlayer.errors import TransportError
from cutlayer.wire.frame import Frame
from cutlayer.wire.messages import Kind, RunOpened

_REPLY = Frame(kind=Kind.RUN_OPENED, header=RunOpened(step=0))


@dataclass(eq=False)
class _Call:
    """A call over hops that answer when they are told to."""

    name: str
    sent: list[tuple[str, int]]
    direction: str = "up"
    num_hops: int = 3
    place: int = 0
    replies: list["Future[Frame]"] = field(init=False)

    def __post_init__(self) -> None:
        self.replies = [Future() for _ in range(self.num_hops)]

    @property
    def is_at_end(self) -> bool:
        return self.place == self.num_hops - 1

    @property
    def under_way(self) -> "Future[Frame]":
        return self.replies[self.place]

    def move_on(self) -> None:
        self.place += 1
        self.sent.append((self.name, self.place))

    def answer(self, place: int) -> None:
        self.replies[place].set_result(_REPLY)


def _flow(*calls: _Call) -> CallFlow:
    flow = CallFlow()
    for call in calls:
        flow.add(call)
    return flow


def test_others_move_on_while_one_is_waited_for() -> None:
    sent: list[tuple[str, int]] = []
    first, second, third = (_Call(name, sent) for name in "abc")
    first.place = 1
    flow = _flow(first, second, third)
    for call in (second, third):
        call.answer(0)
    late = threading.Timer(0.05, first.answer, args=(1,))
    late.start()
    flow.wait_for(first)
    # The one that is waited for is moved by whoever waits.
    assert sent == [("b", 1), ("c", 1)]
    late.join()


def test_no_call_overtakes_an_earlier_one_of_its_direction() -> None:
    sent: list[tuple[str, int]] = []
    first, second = _Call("a", sent), _Call("b", sent)
    other = _Call("down", sent, direction="down")
    flow = _flow(first, second, other)
    second.answer(0)
    other.answer(0)
    late = threading.Timer(0.05, first.answer, args=(0,))
    late.start()
    flow.wait_for(first)
    assert sent == [("down", 1)]
    first.move_on()
    first.answer(1)
    flow.wait_for(first)
    late = threading.Timer(0.05, other.answer, args=(1,))
    late.start()
    flow.wait_for(other)
    late.join()
    assert sent == [("down", 1), ("a", 1), ("a", 2), ("b", 1)]


def test_a_failure_waits_for_whoever_waits_for_it_and_stops_those_behind() -> None:
    sent: list[tuple[str, int]] = []
    first, broken, behind = (_Call(name, sent) for name in "abc")
    first.place = 1
    flow = _flow(first, broken, behind)
    broken.replies[0].set_exception(TransportError("away"))
    behind.answer(0)
    late = threading.Timer(0.05, first.answer, args=(1,))
    late.start()
    flow.wait_for(first)
    assert sent == []
    flow.wait_for(broken)
    assert broken.under_way.exception() is not None
    late.join()
