"""Times of work that other work on the machine disturbs as little as can be.

Where one thread computes, its processor time counts, and of its waiting (for the disk) the least;
several threads have no such clock, so there the fastest quarter of the repetitions stands.
"""

import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

__all__ = ["Lap", "Laps", "undisturbed"]

Lap = tuple[float, float]
"""Seconds on the clock on the wall, and seconds that this thread computed."""


class Laps:
    """Laps by name."""

    def __init__(self) -> None:
        self.laps: dict[str, list[Lap]] = {}

    @contextmanager
    def span(self, lane: str, name: str, **values: int | str) -> Iterator[None]:
        """Time what happens inside; a `Tracer`'s method, so that a step can be timed by phases."""
        wall_s, own_s = time.perf_counter(), time.thread_time()
        yield
        lap = (time.perf_counter() - wall_s, time.thread_time() - own_s)
        self.laps.setdefault(name, []).append(lap)

    def add(self, lane: str, name: str, began_s: float, ended_s: float) -> None:
        """Calls in flight: an echo is never waited for."""

    def seconds(self, name: str, skip: int = 1) -> float:
        """Undisturbed seconds of one lap; the first ones warmed up. 0 where there is none."""
        return undisturbed(self.laps.get(name, ())[skip:])


def undisturbed(laps: Sequence[Lap]) -> float:
    """Seconds that one lap takes on a machine with nothing else to do; 0 of no laps."""
    if not laps:
        return 0.0
    if torch.get_num_threads() > 1:
        walls = sorted(wall_s for wall_s, _ in laps)
        return walls[(len(walls) - 1) // 4]
    waits = (max(0.0, wall_s - own_s) for wall_s, own_s in laps)
    return statistics.median(own_s for _, own_s in laps) + min(waits)
