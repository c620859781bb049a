"""Placement: sticky, by load, and whole again after a replica's death."""

from hypothesis import given
from hypothesis import strategies as st

from cutlayer.server.placement import Placement


def placement(num_replicas: int = 2, **settings: float) -> Placement:
    made = Placement(**settings)
    for replica in range(num_replicas):
        made.mark_up(replica, 0.0)
    return made


def test_new_clients_alternate_between_idle_replicas() -> None:
    placed = placement()
    assert [placed.place(name, 0.0) for name in "abcd"] == [0, 1, 0, 1]


def test_a_client_keeps_its_replica_when_it_comes_back() -> None:
    placed = placement()
    first = {name: placed.place(name, 0.0) for name in "abc"}
    placed.note_tokens(0, 1_000_000, 1.0)
    assert {name: placed.place(name, 2.0) for name in "cba"} == first


def test_a_new_client_avoids_the_replica_that_computes_most() -> None:
    placed = placement()
    placed.place("a", 0.0)
    placed.place("b", 0.0)
    placed.note_tokens(0, 900, 1.0)
    placed.note_tokens(1, 100, 1.0)
    assert placed.place("c", 1.0) == 1
    assert placed.place("d", 1.0) == 1, "0.33 + 0.9 against 0.67 + 0.1"
    assert placed.place("e", 1.0) == 1


def test_old_tokens_weigh_less_than_new_ones() -> None:
    placed = placement(half_life_s=10.0)
    placed.note_tokens(0, 1000, 0.0)
    placed.note_tokens(1, 100, 50.0)
    assert placed.load(0, 50.0) < placed.load(1, 50.0)


def test_a_restarted_replica_counts_its_tokens_from_zero() -> None:
    placed = placement()
    placed.note_tokens(0, 1000, 0.0)
    placed.note_tokens(0, 50, 0.0)
    placed.note_tokens(1, 1050, 0.0)
    assert placed.load(0, 0.0) == placed.load(1, 0.0)


def test_clients_of_a_dead_replica_are_placed_on_live_ones() -> None:
    placed = placement(3)
    for name in "abcdef":
        placed.place(name, 0.0)
    assert placed.mark_down(1) == ["b", "e"]
    assert placed.up == [0, 2]
    assert {placed.place(name, 1.0) for name in "be"} == {0, 2}
    placed.mark_up(1, 2.0)
    assert placed.place("b", 3.0) != 1, "a client that moved stays where it is now"
    assert placed.place("new", 3.0) == 1


def test_with_no_replica_up_nobody_is_placed_and_tokens_are_ignored() -> None:
    placed = placement(1)
    placed.place("a", 0.0)
    placed.mark_down(0)
    placed.note_tokens(0, 10, 1.0)
    assert placed.place("a", 1.0) is None
    placed.mark_up(0, 2.0)
    assert placed.place("a", 2.0) == 0


def test_a_client_that_stays_away_keeps_its_replica_but_is_no_load() -> None:
    placed = placement(2, idle_s=100.0)
    for name in "abcd":
        placed.place(name, 0.0)
    placed.place("b", 150.0)
    placed.place("d", 150.0)
    assert [placed.load(replica, 150.0) for replica in (0, 1)] == [0.0, 1.0]
    assert placed.place("new", 150.0) == 0
    assert placed.place("a", 150.0) == 0


@given(
    num_replicas=st.integers(1, 5),
    events=st.lists(st.tuples(st.sampled_from("pud"), st.integers(0, 9)), max_size=60),
)
def test_every_client_is_on_a_replica_that_is_up(
    num_replicas: int, events: list[tuple[str, int]]
) -> None:
    placed = placement(num_replicas)
    for now, (what, number) in enumerate(events):
        if what == "u":
            placed.mark_up(number % num_replicas, float(now))
        elif what == "d":
            placed.mark_down(number % num_replicas)
        else:
            chosen = placed.place(f"client{number}", float(now))
            assert (chosen in placed.up) if placed.up else (chosen is None)
        on_up = [name for replica in placed.up for name in placed.clients_of(replica)]
        assert len(on_up) == len(set(on_up))
