"""The crash test is seeded, counts right, and can tell a mixture."""

import os
from itertools import pairwise
from multiprocessing import Value

import pytest

from benchmarks.recut_boundaries import Boundaries
from benchmarks.recut_crashes import CrashRequest, _plan
from benchmarks.recut_sides import wanted_at
from cutlayer.model.partition import Cut


def test_boundaries_count_inside_a_recut_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    killed: list[int] = []
    monkeypatch.setattr(os, "kill", lambda pid, signal: killed.append(signal))
    at, most = Value("i", 3), Value("i", 0)
    boundaries = Boundaries(at, most)
    work = boundaries.around(lambda: None)
    work()
    assert not killed
    boundaries.begin()
    work()
    boundaries.begin()
    work()
    boundaries.end()
    assert (len(killed), most.value) == (1, 4)
    work()
    assert len(killed) == 1


def test_the_plan_is_seeded_and_moves_every_time() -> None:
    request = CrashRequest(num_steps=200, num_recuts=20, num_crashes=1, seed=4)
    plan = _plan(request, 20)
    assert plan == _plan(request, 20)
    assert len(plan) == 20
    cuts = [Cut(1, 3), *plan.values()]
    assert all(first != second for first, second in pairwise(cuts))
    assert wanted_at(plan, min(plan) - 1) is None
    assert wanted_at(plan, 10_000) == cuts[-1]
