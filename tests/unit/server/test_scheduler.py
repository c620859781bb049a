"""The batching scheduler: pure, so that every order of arrival can be tried."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cutlayer.server.scheduler import BatchScheduler, Choice, Waiting, WorkKind
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
    """As they waited."""
    num_tokens: tuple[int, ...]
    """Computed of each in this call."""

    @property
    def ended(self) -> list[Waiting]:
        """Requests that are answered after this call."""
        pairs = zip(self.requests, self.num_tokens, strict=True)
        return [request for request, done in pairs if done == request.num_tokens]


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
        runs.append(_Run(now_s, tuple(chosen), choice.num_tokens))
        for request, done in zip(chosen, choice.num_tokens, strict=True):
            assert min(1, request.num_tokens) <= done <= request.num_tokens
            place = left.index(request)
            rest = replace(request, num_tokens=request.num_tokens - done, has_begun=True)
            left[place : place + 1] = [rest] if rest.num_tokens and done else []
        now_s += call_s
    return runs


def _decode(client: str, arrived_s: float = 0.0, num_tokens: int = 1) -> Waiting:
    return Waiting(client=client, arrived_s=arrived_s, num_tokens=num_tokens, kind=WorkKind.DECODE)


_requests = st.lists(
    st.tuples(
        st.sampled_from("abcdef"),
        st.integers(0, 200),
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
    served = [request for run in runs for request in run.ended]
    assert Counter(w.arrived_s for w in served) == Counter(w.arrived_s for w in arrivals)
    assert sum(sum(run.num_tokens) for run in runs) == sum(w.num_tokens for w in arrivals)
    for client in "abcdef":
        own = [w.arrived_s for run in runs for w in run.requests if w.client == client]
        assert own == sorted(own)
    for run in runs:
        clients = [w.client for w in run.requests]
        assert len(clients) == len(set(clients)) <= 4
        assert len({(w.kind, w.graph) for w in run.requests}) == 1
        assert len(clients) == 1 or sum(run.num_tokens) <= 100
        assert len(clients) == 1 or run.requests[0].kind is not WorkKind.OTHER
    # At worst every request waits for its own window and for all the others' calls and windows.
    # A prompt of 200 tokens takes four calls of half a call's tokens.
    assert runs[-1].began_s < 0.0007 * len(arrivals) + len(arrivals) * (0.004 + 0.5)


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


CHUNKED = BatchSettings(prefill_tokens=64, max_tokens=512)


def test_long_prompt_is_computed_in_pieces_with_everybody_s_next_token_beside_each() -> None:
    prompt = _decode("long", num_tokens=1000)
    steps = [_decode(c, n * 0.01 + 0.001, 1) for n in range(20) for c in "abc"]
    runs = _simulate(BatchScheduler(CHUNKED), [prompt, *steps], call_s=0.01)
    pieces = [
        done
        for run in runs
        for request, done in zip(run.requests, run.num_tokens, strict=True)
        if request.client == "long"
    ]
    assert pieces == [64] * 15 + [40]
    for run in runs:
        for step in run.ended:
            assert step.client == "long" or run.began_s - step.arrived_s < 0.02 + 0.002


def test_short_rest_of_a_prompt_costs_no_call_of_its_own() -> None:
    runs = _simulate(BatchScheduler(CHUNKED), [_decode("a", num_tokens=64 + 80)], call_s=0.01)
    assert [run.num_tokens for run in runs] == [(64,), (80,)]


def test_prompts_of_two_clients_take_turns() -> None:
    both = [_decode("a", num_tokens=640), _decode("b", 1e-6, num_tokens=640)]
    runs = _simulate(BatchScheduler(CHUNKED), both, call_s=0.01)
    shares = Counter[str]()
    for run in runs[:10]:
        assert len(run.requests) == 1
        shares[run.requests[0].client] += run.num_tokens[0]
    assert shares["a"] == shares["b"] == 320


def test_end_of_one_prompt_shares_its_call_with_the_next() -> None:
    both = [_decode("a", num_tokens=100), _decode("b", 1e-6, num_tokens=640)]
    runs = _simulate(BatchScheduler(replace_settings(prefill_tokens=128)), both, call_s=0.01)
    assert (runs[0].num_tokens, runs[1].num_tokens) in [((100,), (128,)), ((100, 28), (128,))]


def replace_settings(**changes: object) -> BatchSettings:
    """`CHUNKED` with changes."""
    return CHUNKED.model_copy(update=changes)


@given(st.lists(st.integers(65, 400), min_size=1, max_size=6), st.integers(1, 64))
def test_flood_of_short_decodes_starves_no_prompt(prompts: list[int], short: int) -> None:
    """Short calls that alone fill every call, for ever."""
    scheduler = BatchScheduler(replace_settings(max_tokens=128, max_clients=4))
    long = {f"long{n}": _decode(f"long{n}", 0.0, tokens) for n, tokens in enumerate(prompts)}
    now_s, rounds = 0.0, 0
    while long:
        rounds += 1
        # Eight short ones have to be served as much as a piece before the next one is due.
        assert rounds < 24 * sum(tokens / 64 + 1 for tokens in prompts)
        waiting = [*long.values(), *(_decode(f"short{n}", now_s, short) for n in range(8))]
        choice = scheduler.next_batch(waiting, now_s)
        now_s += 0.01
        for index, done in zip(choice.indices, choice.num_tokens, strict=True):
            request = waiting[index]
            if request.client in long:
                rest = replace(request, num_tokens=request.num_tokens - done, has_begun=True)
                long[request.client] = rest
                if not rest.num_tokens:
                    del long[request.client]


def test_equal_clients_get_equal_shares() -> None:
    """Closed loops of a prompt and some tokens, begun at different times; Jain's index."""
    scheduler = BatchScheduler(CHUNKED)
    clients = [f"c{n}" for n in range(8)]
    turns = dict.fromkeys(clients, 0)
    waiting = {c: _decode(c, 0.0, 500 + 37 * n) for n, c in enumerate(clients)}
    served = Counter[str]()
    now_s = 0.0
    for _ in range(3000):
        requests = list(waiting.values())
        choice = scheduler.next_batch(requests, now_s)
        if not choice.indices:
            now_s = choice.wait_until_s
            continue
        now_s += 0.01
        for index, done in zip(choice.indices, choice.num_tokens, strict=True):
            request = requests[index]
            client, left = request.client, request.num_tokens - done
            served[client] += done
            turns[client] += not left
            size = left or (1 if turns[client] % 40 else 500)
            waiting[client] = _decode(client, request.arrived_s if left else now_s, size)
    values = [served[c] for c in clients]
    assert sum(values) ** 2 / (len(values) * sum(v * v for v in values)) > 0.95


def test_lone_stream_never_waits_for_others() -> None:
    scheduler = BatchScheduler(CHUNKED)
    for number in range(20):
        now_s = number * 0.005
        assert scheduler.next_batch([_decode("a", now_s)], now_s).indices == (0,)


def _circles(scheduler: BatchScheduler, clients: dict[str, float], until_s: float) -> list[int]:
    """Closed loops of single tokens whose owners take so long; how many shared each call."""
    waiting = {client: _decode(client, 0.0) for client in clients}
    later: dict[str, float] = {}
    shared, now_s = [], 0.0
    while now_s < until_s:
        for client in [c for c, at_s in later.items() if at_s <= now_s]:
            waiting[client] = _decode(client, later.pop(client))
        requests = list(waiting.values())
        choice = scheduler.next_batch(requests, now_s) if requests else Choice(())
        if not choice.indices:
            now_s = max(
                now_s + 1e-6, min(choice.wait_until_s, min(later.values(), default=math.inf))
            )
            continue
        now_s += 0.003
        for client in [requests[index].client for index in choice.indices]:
            del waiting[client]
            later[client] = now_s + clients[client]
        shared.append(len(choice.indices))
    return shared


def test_streams_of_one_speed_fall_into_step() -> None:
    clients = {f"c{n}": 0.040 + 0.001 * n for n in range(8)}
    scheduler = BatchScheduler(CHUNKED)
    scheduler.next_batch([_decode("c0")], 0.0)
    shared = _circles(scheduler, clients, 2.0)
    assert sum(shared[-20:]) / 20 > 7
    impatient = BatchScheduler(CHUNKED.model_copy(update={"decode_patience": 0.0}))
    alone = _circles(impatient, clients, 2.0)
    assert sum(alone[-20:]) / 20 < sum(shared[-20:]) / 20


def test_fast_stream_does_not_keep_step_with_a_slow_one() -> None:
    fast = _circles(BatchScheduler(CHUNKED), {"fast": 0.005}, 2.0)
    both = _circles(BatchScheduler(CHUNKED), {"fast": 0.005, "slow": 0.100}, 2.0)
    assert len(both) > 0.85 * len(fast)


def test_client_that_stopped_generating_is_waited_for_once_at_most() -> None:
    scheduler = BatchScheduler(CHUNKED)
    now_s = 0.0
    for _ in range(5):
        both = [_decode("a", now_s), _decode("b", now_s)]
        assert set(scheduler.next_batch(both, now_s).indices) == {0, 1}
        now_s += 0.020
    waits = 0
    for _ in range(5):
        choice = scheduler.next_batch([_decode("a", now_s)], now_s)
        if not choice.indices:
            waits += 1
            assert choice.wait_until_s <= now_s + 0.010
            choice = scheduler.next_batch([_decode("a", now_s)], choice.wait_until_s)
            assert choice.indices
        now_s += 0.020
    assert waits <= 1


def test_rest_of_a_prompt_waits_a_moment_for_who_rode_along_with_the_last_piece() -> None:
    scheduler = BatchScheduler(CHUNKED)
    rest = replace(_decode("a", 0.0, 500), has_begun=True)
    assert scheduler.next_batch([rest, _decode("b")], 0.0).num_tokens == (64, 1)
    choice = scheduler.next_batch([rest], 0.200)
    assert choice.indices == ()
    assert choice.wait_until_s == pytest.approx(0.220)
    both = [rest, _decode("b", 0.205)]
    assert set(scheduler.next_batch(both, 0.205).indices) == {0, 1}
    assert not scheduler.next_batch([rest], 0.400).indices
    assert scheduler.next_batch([rest], 0.4201).indices == (0,)


def test_rest_of_a_lone_prompt_does_not_wait() -> None:
    scheduler = BatchScheduler(CHUNKED)
    rest = replace(_decode("a", 0.0, 500), has_begun=True)
    for now_s in (0.0, 0.2, 0.4):
        assert scheduler.next_batch([rest], now_s).indices == (0,)


def test_prompt_moves_on_beside_next_tokens_however_small_the_calls() -> None:
    scheduler = BatchScheduler(BatchSettings(max_tokens=3))
    taken = 0
    for number in range(20):
        waiting = [_decode("long", num_tokens=100), _decode("short", arrived_s=number / 100)]
        choice = scheduler.next_batch(waiting, 1 + number / 100)
        taken += sum(n for i, n in zip(choice.indices, choice.num_tokens, strict=True) if i == 0)
    assert taken >= 10
