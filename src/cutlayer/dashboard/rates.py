"""Counters to rates: what went through per second, over a short window. It reads no clock."""

from collections import deque

from cutlayer.dashboard.view import Rates
from cutlayer.metrics import Totals

__all__ = ["RateMeter"]


class RateMeter:
    """Keeps the samples of the last `window_s` seconds."""

    def __init__(self, window_s: float = 15.0) -> None:
        self._window_s = window_s
        self._samples: deque[tuple[float, Totals]] = deque()

    def add(self, now_s: float, totals: Totals) -> None:
        """One look at the counters."""
        self._samples.append((now_s, totals))
        while now_s - self._samples[0][0] > self._window_s:
            self._samples.popleft()

    def rates(self) -> Rates:
        """From the oldest sample kept to the newest; zero before there are two."""
        if len(self._samples) < 2:
            return Rates()
        (began_s, old), (ended_s, new) = self._samples[0], self._samples[-1]
        seconds = ended_s - began_s
        if seconds <= 0:
            return Rates()
        return Rates(
            tokens_per_s=_rise(old.tokens, new.tokens) / seconds,
            bytes_up_per_s=_rise(old.bytes_up, new.bytes_up) / seconds,
            bytes_down_per_s=_rise(old.bytes_down, new.bytes_down) / seconds,
        )


def _rise(old: float, new: float) -> float:
    """A replica that is started anew counts from zero again: no throughput is below zero."""
    return max(0.0, new - old)
