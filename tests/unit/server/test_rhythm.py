"""When a stream comes again, from how long it took lately."""

import pytest

from cutlayer.server.rhythm import Rhythm


def _after_circles(circles: dict[str, float], rounds: int = 4) -> tuple[Rhythm, float]:
    """A rhythm in which each client's circle has taken so long, all begun at the same time."""
    rhythm, now_s = Rhythm(), 0.0
    for _ in range(rounds):
        for client in circles:
            rhythm.began(client, now_s)
        for client, circle_s in circles.items():
            rhythm.arrived(client, now_s + circle_s)
        now_s += max(circles.values())
    for client in circles:
        rhythm.began(client, now_s)
    return rhythm, now_s


def test_one_who_is_about_to_come_is_waited_for() -> None:
    rhythm, began_s = _after_circles({"a": 0.04, "b": 0.05})
    now_s = began_s + 0.04
    rhythm.arrived("a", now_s)
    assert rhythm.wait_until(["a"], now_s, 0.5, now_s) == pytest.approx(now_s + 0.02)
    assert rhythm.wait_until(["a"], now_s, 0.1, now_s) == now_s
    assert rhythm.wait_until(["a"], now_s, 0.0, now_s) == now_s


def test_one_who_is_far_away_or_late_is_not_waited_for() -> None:
    rhythm, began_s = _after_circles({"a": 0.01, "b": 0.05})
    now_s = began_s + 0.01
    rhythm.arrived("a", now_s)
    assert rhythm.wait_until(["a"], now_s, 0.5, now_s) == now_s
    late_s = began_s + 0.07
    assert rhythm.wait_until(["a"], late_s, 0.5, late_s) == late_s


def test_unknown_clients_neither_wait_nor_are_waited_for() -> None:
    rhythm = Rhythm()
    rhythm.began("a", 0.0)
    assert rhythm.wait_until(["new"], 1.0, 0.5, 1.0) == 1.0
    rhythm.arrived("stranger", 1.0)
    assert rhythm.wait_until(["stranger"], 1.0, 0.5, 1.0) == 1.0


def test_the_silent_are_forgotten() -> None:
    rhythm, began_s = _after_circles({"a": 0.04, "b": 0.05})
    rhythm.forget(began_s + 60)
    rhythm.began("a", began_s + 60)
    rhythm.arrived("a", began_s + 60.04)
    now_s = began_s + 60.04
    assert rhythm.wait_until(["a"], now_s, 0.5, now_s) == now_s
