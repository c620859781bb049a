"""What the owner's machine and link do: battery, memory, rate and delay of calls.

It judges nothing (`recut_policy`). What cannot be read is unknown, never an error: a policy must
not end a run.
"""

import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from time import monotonic
from typing import Protocol

import psutil

from cutlayer.client.link import Connect
from cutlayer.wire.channel import Channel
from cutlayer.wire.frame import Frame
from cutlayer.wire.wrapped import WrappedChannel

__all__ = [
    "LinkMeter",
    "Machine",
    "MeteredChannel",
    "Readings",
    "Sensors",
    "available_bytes",
    "metered",
]

_NUM_CALLS = 64
_NUM_ENOUGH = 4
"""Calls before which nothing is said of the link."""
_CGROUPS, _OWN_CGROUP = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
_FULL = 100.0


@dataclass(frozen=True, kw_only=True)
class Readings:
    """One look; None is unknown."""

    battery_percent: float | None = None
    """Charge; 100 on mains power."""
    available_bytes: int | None = None
    """Memory that programs may still take."""
    link_mbit_s: float | None = None
    """Rate of the last calls while any was under way, the server's work included."""
    rtt_ms: float | None = None
    """The fastest of the last calls."""


class Sensors(Protocol):
    """Whoever can look."""

    def read(self) -> Readings:
        """One look now."""


@dataclass(frozen=True)
class _Call:
    num_bytes: int
    began_s: float
    ended_s: float


class LinkMeter:
    """The last calls of a link; thread-safe."""

    def __init__(self) -> None:
        self._calls: deque[_Call] = deque(maxlen=_NUM_CALLS)
        self._lock = threading.Lock()

    def add(self, num_bytes: int, began_s: float, ended_s: float) -> None:
        """A call that was answered.

        Args:
            num_bytes: of call and reply.
            began_s: when it was sent.
            ended_s: when its reply was here, of the same monotonic clock.
        """
        with self._lock:
            self._calls.append(_Call(num_bytes, began_s, max(began_s, ended_s)))

    @property
    def mbit_s(self) -> float | None:
        """Bytes over the time in which a call was under way; None before a few calls."""
        calls = self._last()
        busy_s = _covered_s(calls)
        if len(calls) < _NUM_ENOUGH or busy_s <= 0:
            return None
        return 8e-6 * sum(call.num_bytes for call in calls) / busy_s

    @property
    def rtt_ms(self) -> float | None:
        """The fastest call; None before a few calls."""
        calls = self._last()
        if len(calls) < _NUM_ENOUGH:
            return None
        return 1e3 * min(call.ended_s - call.began_s for call in calls)

    def _last(self) -> list[_Call]:
        with self._lock:
            return list(self._calls)


class MeteredChannel(WrappedChannel):
    """A channel whose answered calls are told to a meter; a failed one says nothing of the link."""

    def __init__(self, channel: Channel, meter: LinkMeter) -> None:
        super().__init__(channel)
        self._meter = meter

    def call(self, frame: Frame, deadline_s: float | None = None) -> Future[Frame]:
        """See `Channel`."""
        began_s = monotonic()
        future = self._inner.call(frame, deadline_s)

        def tell(done: "Future[Frame]") -> None:
            if not done.cancelled() and done.exception() is None:
                num_bytes = _tensor_bytes(frame) + _tensor_bytes(done.result())
                self._meter.add(num_bytes, began_s, monotonic())

        future.add_done_callback(tell)
        return future


class Machine:
    """This machine and the link of one client."""

    def __init__(self, link: LinkMeter | None = None) -> None:
        """
        Args:
            link: of the run's calls; None knows nothing of the link.
        """
        self._link = link

    def read(self) -> Readings:
        """See `Sensors`."""
        link = self._link
        return Readings(
            battery_percent=_battery_percent(),
            available_bytes=available_bytes(),
            link_mbit_s=None if link is None else link.mbit_s,
            rtt_ms=None if link is None else link.rtt_ms,
        )


def available_bytes(
    cgroups: Path = _CGROUPS,
    own: Path = _OWN_CGROUP,
    of_machine: Callable[[], int] = lambda: int(psutil.virtual_memory().available),
) -> int | None:
    """Memory that programs may still take: the machine's, and no more than control groups allow.

    Args:
        cgroups: where control groups (v2) are mounted.
        own: which of them this process is in.
        of_machine: what the machine has left.
    """
    try:
        left = of_machine()
    except OSError:
        return None
    return min([left, *_left_in_groups(cgroups, own)])


def metered(connect: Connect, meter: LinkMeter) -> Connect:
    """The same connections, whose calls the meter hears of."""
    return lambda place: MeteredChannel(connect(place), meter)


def _left_in_groups(cgroups: Path, own: Path) -> Iterator[int]:
    """What is left of the limits of the own group and of all above it."""
    place = next((line[3:] for line in _lines(own) if line.startswith("0::")), "/")
    inner = cgroups / place.strip("/")
    for group in (inner, *inner.parents):
        if not group.is_relative_to(cgroups):
            return
        limit, used = _number(group / "memory.max"), _number(group / "memory.current")
        if limit is not None and used is not None:
            # Pages of files count as used and are given back when memory is needed.
            yield max(0, limit - used + _reclaimable(group / "memory.stat"))


def _battery_percent() -> float | None:
    try:
        battery = psutil.sensors_battery()
    except (OSError, AttributeError, NotImplementedError, ValueError):
        # Some platforms have no such function, some list a battery that cannot be read.
        return None
    if battery is None:
        return None
    return _FULL if battery.power_plugged else float(battery.percent)


def _number(path: Path) -> int | None:
    """None where there is no file, or it says "max"."""
    text = "".join(_lines(path))
    return int(text) if text.isascii() and text.isdigit() else None


def _reclaimable(path: Path) -> int:
    found = [line.split() for line in _lines(path) if line.startswith("inactive_file ")]
    return sum(int(words[1]) for words in found if len(words) == 2 and words[1].isdigit())


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        return []


def _tensor_bytes(frame: Frame) -> int:
    return sum(packed.num_bytes for packed in frame.tensors.values())


def _covered_s(calls: list[_Call]) -> float:
    """Length of the union of the calls' times: several are under way at once."""
    total_s, end_s = 0.0, float("-inf")
    for call in sorted(calls, key=lambda one: one.began_s):
        total_s += max(0.0, call.ended_s - max(call.began_s, end_s))
        end_s = max(end_s, call.ended_s)
    return total_s
