"""The fair scheduler: pure, so that every order can be tried."""

from hypothesis import given
from hypothesis import strategies as st

from cutlayer.server.scheduler import FairScheduler, Waiting


def _served(waiting: list[Waiting]) -> list[Waiting]:
    scheduler, queue, served = FairScheduler(), list(waiting), []
    while queue:
        (chosen,) = scheduler.next_batch(queue, now_s=0.0)
        served.append(queue.pop(chosen))
    return served


@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 500)), min_size=1, max_size=30))
def test_requests_of_one_client_keep_their_order(requests: list[tuple[str, int]]) -> None:
    waiting = [
        Waiting(client=client, arrived_s=float(number), num_tokens=num_tokens)
        for number, (client, num_tokens) in enumerate(requests)
    ]
    served = _served(waiting)
    assert sorted(w.arrived_s for w in served) == [w.arrived_s for w in waiting]
    for client in "abc":
        own = [w.arrived_s for w in served if w.client == client]
        assert own == sorted(own)


def test_client_with_one_small_request_does_not_wait_for_a_flood() -> None:
    flood = [Waiting(client="big", arrived_s=0.0, num_tokens=1000) for _ in range(10)]
    small = Waiting(client="small", arrived_s=1.0, num_tokens=1)
    assert _served([*flood, small]).index(small) == 1


def test_long_idle_client_gets_no_lasting_monopoly() -> None:
    scheduler = FairScheduler(half_life_s=1.0)
    busy = Waiting(client="busy", arrived_s=0.0, num_tokens=1000)
    scheduler.next_batch([busy], now_s=0.0)
    both = [busy, Waiting(client="idle", arrived_s=0.0, num_tokens=10)]
    assert scheduler.next_batch(both, now_s=0.0) == [1]
    assert scheduler.next_batch(both, now_s=30.0) == [0]
