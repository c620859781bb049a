"""Everybody computes the same graph, and it is dense enough for what it promises."""

import random
from itertools import pairwise

import pytest

from cutlayer.errors import ProtocolError, QuorumNotMet
from cutlayer.federation.secure.graph import Graph, degree_for, threshold_for
from cutlayer.federation.settings import SecureSettings
from tests.unit.federation.secure.crowd import attempt_of, names

_SHARE = 0.67


def graph_of(num_members: int, degree: int, binding: bytes = b"round 1") -> Graph:
    return Graph(names(num_members), degree, binding)


@pytest.mark.parametrize(("num_members", "degree"), [(3, 2), (7, 4), (20, 6), (50, 32)])
def test_neighbourhood_is_mutual_and_regular(num_members: int, degree: int) -> None:
    graph = graph_of(num_members, degree)
    for name in names(num_members):
        around = graph.neighbours(name)
        assert len(around) == len(set(around)) == degree
        assert name not in around
        assert all(name in graph.neighbours(other) for other in around)
        assert graph.holders(name) == tuple(sorted((*around, name)))


def test_graph_is_connected() -> None:
    graph, seen = graph_of(100, 4), {"owner0"}
    while True:
        more = {other for name in seen for other in graph.neighbours(name)} | seen
        if more == seen:
            break
        seen = more
    assert len(seen) == 100


def test_order_of_the_cohort_does_not_matter_and_the_binding_does() -> None:
    shuffled = names(40)
    random.Random(1).shuffle(shuffled)
    first, same = graph_of(40, 6), Graph(shuffled, 6, b"round 1")
    other = graph_of(40, 6, b"round 2")
    everybody = names(40)
    assert all(first.neighbours(name) == same.neighbours(name) for name in everybody)
    assert sum(first.neighbours(name) != other.neighbours(name) for name in everybody) > 30


@pytest.mark.parametrize("change", [{"number": 2}, {"round_number": 2}])
def test_every_attempt_has_another_graph(change: dict[str, int]) -> None:
    cohort, policy = names(40), SecureSettings(neighbours=6)
    first, second = attempt_of(cohort, policy).graph, attempt_of(cohort, policy, **change).graph
    assert any(first.neighbours(name) != second.neighbours(name) for name in cohort)


def test_small_cohorts_have_complete_graphs() -> None:
    for num_members in range(3, 34):
        assert degree_for(num_members, _SHARE, None) == num_members - 1


def test_degree_grows_as_the_logarithm() -> None:
    sizes = [100, 1000, 10_000, 100_000]
    degrees = [degree_for(size, _SHARE, None) for size in sizes]
    assert degrees == [32, 48, 66, 76]
    steps = [more - fewer for fewer, more in pairwise(degrees)]
    assert max(steps) <= 20, "ten times the members cost a constant more"


@pytest.mark.parametrize("num_members", [60, 300, 1000])
def test_degree_keeps_its_promise_when_members_are_drawn(num_members: int) -> None:
    """Ten in a hundred vanish: no member loses too many neighbours in 300 draws."""
    degree = degree_for(num_members, _SHARE, None)
    threshold, draw = threshold_for(degree, _SHARE), random.Random(num_members)
    graph, cohort = graph_of(num_members, degree), names(num_members)
    holders = {name: set(graph.holders(name)) for name in cohort}
    for _ in range(300 if num_members < 1000 else 60):
        gone = set(draw.sample(cohort, num_members // 10))
        fewest = min(len(holders[name] - gone) for name in cohort if name not in gone)
        assert fewest >= threshold


def test_a_set_degree_is_taken_up_to_even_and_never_exceeds_the_others() -> None:
    assert degree_for(100, _SHARE, 7) == 8
    assert degree_for(100, _SHARE, 8) == 8
    assert degree_for(6, _SHARE, 80) == 5


@pytest.mark.parametrize(
    ("degree", "share", "threshold"),
    [
        (2, 0.51, 3),
        (2, 0.67, 3),
        (3, 0.67, 3),
        (6, 0.67, 5),
        (5, 2 / 3, 4),
        (48, 0.67, 33),
        (4, 1, 5),
    ],
)
def test_threshold_counts_the_member_itself(degree: int, share: float, threshold: int) -> None:
    assert threshold_for(degree, share) == threshold


def test_impossible_cohorts_are_refused() -> None:
    with pytest.raises(QuorumNotMet, match="needs 3 members, the cohort has 2"):
        graph_of(2, 1)
    with pytest.raises(ProtocolError, match="twice"):
        Graph(["a", "b", "b"], 2, b"")
    with pytest.raises(ProtocolError, match="'stranger' is not in the cohort"):
        graph_of(4, 3).neighbours("stranger")
