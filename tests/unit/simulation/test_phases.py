"""The clock of phases."""

from cutlayer.simulation.phases import PhaseClock


def test_each_phase_lasts_until_the_next_begins() -> None:
    now_s = 100.0
    said: list[str] = []
    clock = PhaseClock(said.append, lambda: now_s)
    clock.begin("training", "training now")
    now_s = 103.0
    clock.begin("scores", "scoring now")
    now_s = 104.5
    clock.stop()
    now_s = 110.0
    clock.stop()
    assert clock.seconds_by_phase == {"training": 3.0, "scores": 1.5}
    assert said == ["training now", "scoring now"]


def test_nothing_is_timed_before_the_first_phase() -> None:
    clock = PhaseClock([].append)
    clock.stop()
    assert clock.seconds_by_phase == {}
