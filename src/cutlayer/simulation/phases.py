"""How long each phase of a run takes, and a line when it begins.

It does not print: whoever made the clock is told.
"""

import time
from collections.abc import Callable

__all__ = ["PhaseClock"]


class PhaseClock:
    """Times phases that follow one another."""

    def __init__(
        self, say: Callable[[str], None], monotonic_s: Callable[[], float] = time.monotonic
    ) -> None:
        """
        Args:
            say: told a line when a phase begins.
            monotonic_s: the clock, in seconds.
        """
        self.seconds_by_phase: dict[str, float] = {}
        self._say = say
        self._monotonic_s = monotonic_s
        self._name: str | None = None
        self._began_s = 0.0

    def begin(self, name: str, text: str) -> None:
        """End the phase before and begin this one.

        Args:
            name: key of the phase in `seconds_by_phase`.
            text: the line.
        """
        self.stop()
        self._say(text)
        self._name, self._began_s = name, self._monotonic_s()

    def stop(self) -> None:
        """End the running phase, if there is one."""
        if self._name is not None:
            self.seconds_by_phase[self._name] = self._monotonic_s() - self._began_s
        self._name = None
