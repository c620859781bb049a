"""The batching scheduler: pure, so that every order of arrival can be tried."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cutlayer.server.scheduler import BatchScheduler, Waiting, WorkKind
from cutlayer.server.settings import BatchSettings

ONE_BY_ONE = BatchSettings(max_clients=1)
TOGETHER = BatchSettings(window_ms=2, backward_window_ms=50, max_tokens=100, max_clients=4)
JOINT_KINDS = [WorkKind.FORWARD, WorkKind.EVALUATE, WorkKind.DECODE, WorkKind.BACKWARD]


def _forward(client: str, arrived_s: float = 0.0, num_tokens: int = 10) -> Waiting:
    return Waiting(client=client, arrived_s=arrived_s, num_tokens=num_tokens, kind=WorkKind.FORWARD)


def _backward(client: str, graph: int | None, expected: str, arrived_s: float = 0.0) -> Waiting:
    return Waiting(
        client=client,
        arrived_s=arrived_s,
        num_tokens=10,
        kind=WorkKind.BACKWARD,
        graph=graph,
        expected=frozenset(expected),
    )


@dataclass(frozen=True)
class _Run:
    """One call that a simulated trunk made."""

    began_s: float
    requests: tuple[Waiting, ...]


def _simulate(scheduler: BatchScheduler, arrivals: Sequence[Waiting], call_s: float) -> list[_Run]:
    """Serve everything as the runner does; fails if the scheduler ever waits in vain."""
    left, runs, now_s = sorted(arrivals, key=lambda w: w.arrived_s), [], 0.0
    while left:
        here = [request for request in left if request.arrived_s <= now_s]
        coming_s = min((w.arrived_s for w in left if w.arrived_s > now_s), default=math.inf)
        if not here:
            now_s = coming_s
            continue
        choice = scheduler.next_batch(here, now_s)
        if not choice.indices:
            assert now_s < choice.wait_until_s < math.inf
            now_s = min(choice.wait_until_s, coming_s)
            continue
        chosen = [here[index] for index in choice.indices]
        runs.append(_Run(now_s, tuple(chosen)))
        for request in chosen:
            left.remove(request)
        now_s += call_s
    return runs


_requests = st.lists(
    st.tuples(
        st.sampled_from("abcdef"),
        st.integers(0, 60),
        st.sampled_from([*JOINT_KINDS, WorkKind.OTHER]),
        st.integers(0, 3),
    ),
    min_size=1,
    max_size=40,
)


@settings(max_examples=300)
@given(_requests, st.integers(0, 2**12))
def test_everything_is_served_once_in_order_and_within_limits(
    requests: list[tuple[str, int, WorkKind, int]], members: int
) -> None:
    arrivals = []
    for number, (client, num_tokens, kind, graph) in enumerate(requests):
        expected = {c for bit, c in enumerate("abcdef") if members >> (bit + graph) & 1}
        arrivals.append(
            Waiting(
                client=client,
                arrived_s=number * 0.0007,
                num_tokens=num_tokens,
                kind=kind,
                graph=graph if kind is WorkKind.BACKWARD and graph else None,
                expected=frozenset(expected | {client}),
            )
        )
    runs = _simulate(BatchScheduler(TOGETHER), arrivals, call_s=0.001)
    served = [request for run in runs for request in run.requests]
    assert Counter(served) == Counter(arrivals)
    for client in "abcdef":
        own = [w.arrived_s for w in served if w.client == client]
        assert own == sorted(own)
    for run in runs:
        clients = [w.client for w in run.requests]
        assert len(clients) == len(set(clients)) <= 4
        assert len({(w.kind, w.graph) for w in run.requests}) == 1
        assert len(clients) == 1 or sum(w.num_tokens for w in run.requests) <= 100
        assert len(clients) == 1 or run.requests[0].kind is not WorkKind.OTHER
    # At worst every request waits for its own window and for all the others' calls and windows.
    assert runs[-1].began_s < 0.0007 * len(arrivals) + len(arrivals) * (0.001 + 0.5)


@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 500)), min_size=1, max_size=30))
def test_one_client_at_a_time_never_waits(requests: list[tuple[str, int]]) -> None:
    arrivals = [
        _forward(client, arrived_s=number * 1e-6, num_tokens=num_tokens)
        for number, (client, num_tokens) in enumerate(requests)
    ]
    runs = _simulate(BatchScheduler(ONE_BY_ONE), arrivals, call_s=1.0)
    assert [len(run.requests) for run in runs] == [1] * len(arrivals)
    assert [run.began_s for run in runs] == pytest.approx(range(len(arrivals)))


def test_client_with_one_small_request_does_not_wait_for_a_flood() -> None:
    flood = [Waiting(client="big", arrived_s=0.0, num_tokens=1000 + number) for number in range(10)]
    small = Waiting(client="small", arrived_s=0.1, num_tokens=1)
    runs = _simulate(BatchScheduler(TOGETHER), [*flood, small], call_s=0.2)
    assert runs[1].requests == (small,)


def test_flood_of_one_client_leaves_room_for_every_other_in_each_call() -> None:
    flood = [_forward("big", number * 1e-6, num_tokens=30) for number in range(12)]
    others = [_forward(c, 0.001 + n * 1e-6, num_tokens=30) for n, c in enumerate("bcdef")]
    runs = _simulate(BatchScheduler(TOGETHER), [*flood, *others], call_s=0.01)
    ended = [n for n, run in enumerate(runs) if any(w.client != "big" for w in run.requests)]
    assert max(ended) <= 3


@pytest.mark.parametrize(("kind", "num_tokens"), [(WorkKind.OTHER, 0), (WorkKind.DECODE, 1)])
def test_flood_of_next_to_nothing_starves_nobody(kind: WorkKind, num_tokens: int) -> None:
    flood = [
        Waiting(client="flood", arrived_s=n * 1e-3, num_tokens=num_tokens, kind=kind)
        for n in range(400)
    ]
    steps = [_forward("busy", n * 1e-3, num_tokens=100) for n in range(10)]
    runs = _simulate(BatchScheduler(TOGETHER), [*flood, *steps], call_s=0.01)
    last = max(n for n, run in enumerate(runs) if run.requests[0].client == "busy")
    assert last < 100


def test_server_s_own_work_does_not_queue_behind_its_past() -> None:
    own = [Waiting(client="", arrived_s=n * 1e-6, num_tokens=0) for n in range(20)]
    steps = [_forward("busy", n * 1e-6, num_tokens=10) for n in range(20)]
    runs = _simulate(BatchScheduler(TOGETHER), [*own, *steps], call_s=0.01)
    assert max(n for n, run in enumerate(runs) if not run.requests[0].client) < 22


def test_long_idle_client_gets_no_lasting_monopoly() -> None:
    scheduler = BatchScheduler(ONE_BY_ONE, half_life_s=1.0)
    busy = _forward("busy", num_tokens=1000)
    scheduler.next_batch([busy], now_s=0.0)
    both = [busy, _forward("idle", num_tokens=10)]
    assert scheduler.next_batch(both, now_s=0.0).indices == (1,)
    assert scheduler.next_batch(both, now_s=30.0).indices == (0,)


def test_lone_client_pays_no_window() -> None:
    scheduler = BatchScheduler(TOGETHER)
    for number in range(5):
        now_s = number * 0.01
        assert scheduler.next_batch([_forward("a", now_s)], now_s).indices == (0,)


def test_forward_waits_its_window_for_an_active_client_and_no_longer() -> None:
    scheduler = BatchScheduler(TOGETHER)
    scheduler.next_batch([_forward("b")], 0.0)
    first = _forward("a", 0.010)
    choice = scheduler.next_batch([first], 0.010)
    assert choice.indices == ()
    assert choice.wait_until_s == pytest.approx(0.012)
    assert set(scheduler.next_batch([first, _forward("b", 0.011)], 0.011).indices) == {0, 1}
    assert scheduler.next_batch([first], 0.0121).indices == (0,)
    assert scheduler.next_batch([replace(first, arrived_s=2.0)], 2.0).indices == (0,)


def test_full_call_does_not_wait() -> None:
    scheduler = BatchScheduler(TOGETHER)
    scheduler.next_batch([_forward("z")], 0.0)
    assert scheduler.next_batch([_forward("a", 0.01, num_tokens=100)], 0.01).indices == (0,)
    many = [_forward(c, 0.02, num_tokens=1) for c in "bcdef"]
    assert len(scheduler.next_batch(many, 0.02).indices) == 4


def test_request_larger_than_the_limit_runs_alone() -> None:
    scheduler = BatchScheduler(TOGETHER)
    both = [_forward("a", num_tokens=500), _forward("b", 0.001, num_tokens=1)]
    assert scheduler.next_batch(both, 0.001).indices == (0,)


def test_backward_runs_at_once_when_all_members_are_there() -> None:
    scheduler = BatchScheduler(TOGETHER)
    waiting = [_backward("a", 7, "ab"), _backward("b", 7, "ab"), _backward("c", 8, "c")]
    assert set(scheduler.next_batch(waiting, 0.0).indices) in ({0, 1}, {2})


def test_backward_window_moves_with_progress_but_not_for_ever() -> None:
    scheduler = BatchScheduler(TOGETHER)
    waiting = [_backward("a", 7, "abcd", 0.0)]
    assert scheduler.next_batch(waiting, 0.001).wait_until_s == pytest.approx(0.05)
    waiting.append(_backward("b", 7, "abcd", 0.04))
    assert scheduler.next_batch(waiting, 0.06).wait_until_s == pytest.approx(0.09)
    waiting.append(_backward("c", 7, "abcd", 3.0))
    assert set(scheduler.next_batch(waiting, 3.0).indices) == {0, 1, 2}


def test_gradients_without_a_graph_run_together_at_once() -> None:
    waiting = [_backward("a", None, ""), _backward("b", None, ""), _backward("c", 3, "cd")]
    assert set(BatchScheduler(TOGETHER).next_batch(waiting, 0.0).indices) == {0, 1}


def test_while_a_backward_waits_other_work_is_done() -> None:
    waiting = [_backward("a", 7, "ab"), Waiting(client="c", arrived_s=0.0, num_tokens=0)]
    assert BatchScheduler(TOGETHER).next_batch(waiting, 0.0).indices == (1,)


def test_straggler_runs_its_forwards_alone_until_it_keeps_up() -> None:
    scheduler = BatchScheduler(TOGETHER)
    both = [_forward("a"), _forward("slow")]
    assert len(scheduler.next_batch(both, 0.0).indices) == 2
    late = replace(_backward("a", 1, ""), expected=frozenset({"a", "slow"}))
    assert scheduler.next_batch([late], 0.2).indices == (0,)
    sizes = [len(scheduler.next_batch(both, 0.3).indices) for _ in range(6)]
    assert sizes[0] == 1
    assert sizes[-1] == 2


def test_straggler_is_not_waited_for_while_it_runs_alone() -> None:
    scheduler = BatchScheduler(TOGETHER)
    scheduler.next_batch([_forward("a"), _forward("slow")], 0.0)
    late = replace(_backward("a", 1, ""), expected=frozenset({"a", "slow"}))
    scheduler.next_batch([late], 0.2)
    assert scheduler.next_batch([_forward("a", 0.21)], 0.21).indices == (0,)
