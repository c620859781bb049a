"""When a live run should be cut elsewhere: battery, memory and link against the owner's thresholds.

It reads no sensor (`recut_sensors`), moves nothing and asks nobody (`recut`): whoever trains asks
`wanted` between two steps, and tells what came of it.
"""

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from cutlayer.client.recut_sensors import Readings, Sensors
from cutlayer.client.recut_settings import RecutSettings
from cutlayer.model.partition import Cut

__all__ = ["RecutPolicy", "shows_blocks"]

_log = logging.getLogger(__name__)
_GB, _FULL = 1e9, 100.0
_LONGEST_WAIT = 64
"""Cool-downs that a return waits at most, however often it was undone."""


@dataclass(frozen=True, kw_only=True)
class _Threshold:
    """One reading with its border."""

    name: str
    """What it is, with a place for the reading."""
    cut: Cut
    """Where to, beyond the border."""
    value: Callable[[Readings], float | None]
    """The reading; None where it is unknown."""
    border: float
    margin: float
    """All is well again so far beyond the border; between the two nothing changes."""
    is_floor: bool = True
    """Whether less is bad; else more is."""
    most: float = float("inf")
    """The greatest reading there is."""

    def judge(self, readings: Readings) -> bool | None:
        """Whether it is bad, well, or neither."""
        value = self.value(readings)
        if value is None:
            return None
        more = 1 + self.margin
        if self.is_floor:
            is_bad, is_well = value < self.border, value >= min(self.most, self.border * more)
        else:
            is_bad, is_well = value > self.border, value <= self.border / more
        return is_bad if is_bad or is_well else None

    def explain(self, readings: Readings) -> str:
        """The reason, in words."""
        return self.name.format(value=self.value(readings), border=self.border)


class RecutPolicy:
    """Thresholds with a memory: no flapping, no question that was refused before."""

    def __init__(self, settings: RecutSettings, cut: Cut, sensors: Sensors) -> None:
        """
        Args:
            settings: thresholds and waits.
            cut: where the run stands.
            sensors: what the machine and its link do.
        """
        self._settings = settings
        self._sensors = sensors
        self._thresholds = tuple(_thresholds(settings))
        self._bad: dict[_Threshold, str] = {}
        self._cut = cut
        # A process that starts at a cut of the policy's own has been sent there by an earlier one.
        self._is_away = any(cut == one.cut for one in self._thresholds)
        self._asked: Cut | None = None
        self._refused: Cut | None = None
        self._said: set[tuple[Cut, str]] = set()
        self._look_at_s = self._cool_until_s = self._return_at_s = float("-inf")
        self._returned_s: float | None = None
        self._return_wait_s = settings.cool_down_s
        self.reason = ""
        """Why the last answer of `wanted` was wanted, for log and people."""

    def wanted(self, now_s: float) -> Cut | None:
        """Where the run should go now; None where it is to stay.

        Args:
            now_s: a monotonic clock.
        """
        if not self._thresholds or now_s < self._look_at_s:
            return None
        self._look_at_s = now_s + self._settings.look_every_s
        self._judge(self._sensors.read())
        target, reason = self._target(now_s)
        if target is None or target == self._cut:
            self._refused = None
            return None
        if now_s < self._cool_until_s or target == self._refused:
            return None
        self._asked, self.reason = target, reason
        if not self._settings.share_adapter and shows_blocks(self._cut, target):
            self.refused(
                "blocks would move to the server with their trained adapter, which "
                "recut.share_adapter does not accept"
            )
            return None
        return target

    def moved(self, cut: Cut, now_s: float) -> None:
        """The run has been cut elsewhere, as was wanted here or by somebody's command."""
        if cut == self._cut:
            return
        was_asked, is_home = cut == self._asked, cut == self._home
        if was_asked and is_home:
            self._returned_s = now_s
        elif was_asked and self._returned_s is not None:
            self._wait_longer(now_s - self._returned_s)
        self._is_away = was_asked and not is_home
        self._cut, self._asked, self._refused = cut, None, None
        self._cool_until_s = now_s + self._settings.cool_down_s
        self._return_at_s = now_s + self._return_wait_s

    def refused(self, why: str) -> None:
        """What was wanted last cannot be: that is said once, and it is wanted again only after all
        was well or after something else was wanted.

        Args:
            why: in words; no text of a row.
        """
        if self._asked is None:
            return
        cut, self._refused, self._asked = self._asked, self._asked, None
        if (cut, why) in self._said:
            return
        self._said.add((cut, why))
        _log.warning(
            "the re-cut to %d:%d, wanted because %s, is refused: %s; the run goes on as it is",
            cut.lower,
            cut.upper,
            self.reason,
            why,
        )

    @property
    def _home(self) -> Cut | None:
        pair = self._settings.return_cut
        return None if pair is None else Cut(*pair)

    def _judge(self, readings: Readings) -> None:
        for one in self._thresholds:
            verdict = one.judge(readings)
            if verdict:
                self._bad[one] = one.explain(readings)
            elif verdict is False:
                self._bad.pop(one, None)

    def _target(self, now_s: float) -> tuple[Cut | None, str]:
        """The first of the thresholds that is bad, in the order of harm; else home."""
        for one in self._thresholds:
            if one in self._bad:
                return one.cut, self._bad[one]
        if self._is_away and now_s >= self._return_at_s:
            return self._home, "battery, memory and link are well again"
        return None, ""

    def _wait_longer(self, stayed_s: float) -> None:
        """A return that did not last makes the next one wait: what freed memory was the move."""
        cool_s = self._settings.cool_down_s
        longer_s = min(2 * self._return_wait_s, _LONGEST_WAIT * cool_s)
        self._return_wait_s = longer_s if stayed_s < 2 * self._return_wait_s else cool_s


def shows_blocks(before: Cut, after: Cut) -> bool:
    """Whether blocks move from the client to the server: what they learnt becomes visible there."""
    return after.lower < before.lower or after.upper > before.upper


def _thresholds(settings: RecutSettings) -> Iterator[_Threshold]:
    """In the order of harm: a process without memory is killed, one without battery stops."""
    margin = settings.margin
    memory, battery, link = settings.memory, settings.battery, settings.link
    if memory is not None:
        yield _Threshold(
            name="{value:.2f} GB of memory are available, less than {border:g}",
            cut=Cut(*memory.cut),
            value=_available_gb,
            border=memory.below_gb,
            margin=margin,
        )
    if battery is not None:
        yield _Threshold(
            name="the battery is at {value:.0f} percent, below {border:g}",
            cut=Cut(*battery.cut),
            value=lambda readings: readings.battery_percent,
            border=battery.below_percent,
            margin=margin,
            most=_FULL,
        )
    if link is not None and link.below_mbit_s is not None:
        yield _Threshold(
            name="the link carries {value:.2f} Mbit/s, less than {border:g}",
            cut=Cut(*link.cut),
            value=lambda readings: readings.link_mbit_s,
            border=link.below_mbit_s,
            margin=margin,
        )
    if link is not None and link.above_rtt_ms is not None:
        yield _Threshold(
            name="the fastest call took {value:.0f} ms, more than {border:g}",
            cut=Cut(*link.cut),
            value=lambda readings: readings.rtt_ms,
            border=link.above_rtt_ms,
            margin=margin,
            is_floor=False,
        )


def _available_gb(readings: Readings) -> float | None:
    return None if readings.available_bytes is None else readings.available_bytes / _GB
