"""A loopback channel with a bad link: what goes wrong on the way between a member and the server.

It does not choose faults (`fault_plan`) nor start or end anybody (`fault_world`).
"""

import random
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field

from benchmarks.fault_corrupt import corrupted
from benchmarks.fault_plan import SERVER, Deed, Fault
from cutlayer.errors import CutlayerError, TransportError
from cutlayer.wire.channel import Channel
from cutlayer.wire.frame import Frame
from cutlayer.wire.messages import Hello

__all__ = ["FaultyChannel", "Killed", "Link", "Script"]

_NOTICED_S = 0.5
"""Until a dead link is noticed at the member."""
_HELD_S = 0.1
_SLOW_S = 0.08


class Killed(BaseException):
    """The member's process ends here; no `except Exception` may stop it."""

    def __init__(self, fault: Fault) -> None:
        super().__init__(str(fault))
        self.fault = fault


@dataclass
class Link:
    """The state of one member's way to the server, over all its connections."""

    cut_until_s: float = 0.0
    is_cut_up: bool = False
    is_cut_down: bool = False
    slow_until_s: float = 0.0
    past: list[Frame] = field(default_factory=list)
    """Calls so far, for replays."""

    @property
    def is_cut(self) -> bool:
        """Whether something is lost now."""
        return time.monotonic() < self.cut_until_s


class Script:
    """The plan's faults, each of which happens once, and the links that they act on."""

    def __init__(self, faults: Sequence[Fault], act: Callable[[Fault], None]) -> None:
        """Args:
        faults: of the plan.
        act: does what happens to the server.
        """
        self._waiting = [fault for fault in faults if fault.deed is not Deed.LATE]
        self._act = act
        self._seen: dict[int, int] = {}
        self._lock = threading.Lock()
        self.links: dict[str, Link] = {}
        self.done: list[Fault] = []

    def met(self, who: str, stage: str) -> list[Fault]:
        """Faults that are due now that this call of this member, or this stage, is reached."""
        due = []
        with self._lock:
            for fault in list(self._waiting):
                if fault.stage != stage or fault.victim not in (who, SERVER):
                    continue
                self._seen[id(fault)] = self._seen.get(id(fault), 0) + 1
                if self._seen[id(fault)] == fault.occurrence:
                    self._waiting.remove(fault)
                    self.done.append(fault)
                    due.append(fault)
        return due

    def link_of(self, member: str) -> Link:
        """That member's."""
        with self._lock:
            return self.links.setdefault(member, Link())

    def strike(self, fault: Fault) -> None:
        """Something happens to the server."""
        self._act(fault)


class FaultyChannel:
    """Implements `wire.channel.Channel` around another one."""

    def __init__(self, inner: Channel, member: str, script: Script, gate: threading.Event) -> None:
        """Args:
        inner: what really carries frames.
        member: whose.
        script: what goes wrong.
        gate: cleared while the server is paused.
        """
        self._inner, self._member, self._script, self._gate = inner, member, script, gate
        self._link = script.link_of(member)
        self._open: set[Future[Frame]] = set()
        self._lock = threading.Lock()
        self._is_broken = False
        self._is_silent = False
        self._held: Callable[[], None] | None = None

    @property
    def bytes_sent(self) -> int:
        """Of the channel inside."""
        return self._inner.bytes_sent

    @property
    def bytes_received(self) -> int:
        """Of the channel inside."""
        return self._inner.bytes_received

    def call(self, frame: Frame, deadline_s: float | None = None) -> Future[Frame]:
        """Send a frame, if nothing happens on the way."""
        outer: Future[Frame] = Future()
        outer.set_running_or_notify_cancel()
        with self._lock:
            self._open.add(outer)
        faults = [] if isinstance(frame.header, Hello) else self._met(frame)
        for fault in (f for f in faults if not f.is_after):
            frame = self._before(fault, frame)
        held, self._held = self._held, None
        if not any(fault.deed is Deed.LOSE_CALL for fault in faults):
            self._carry(frame, outer, faults)
        if held is not None:
            held()
        self._link.past.append(frame)
        for fault in (f for f in faults if f.is_after):
            self._after(fault, frame)
        if any(fault.deed is Deed.LOSE_CALL for fault in faults):
            self.break_off()
        return outer

    def close(self) -> None:
        """End the connection, unless the machine that would tell it is gone."""
        self.break_off(tells=not self._is_silent)

    def break_off(self, tells: bool = True) -> None:
        """The connection is lost: every open call fails."""
        with self._lock:
            self._is_broken = True
            lost, self._open = self._open, set()
        for future in lost:
            if not future.done():
                future.set_exception(TransportError("the connection was lost"))
        if tells:
            self._inner.close()

    def vanish(self) -> None:
        """From now on the server hears nothing more, not even that the connection ended."""
        self._is_silent = True
        self.break_off(tells=False)

    def _met(self, frame: Frame) -> list[Fault]:
        if time.monotonic() < self._link.slow_until_s:
            time.sleep(_SLOW_S)
        return self._script.met(self._member, frame.kind.name)

    def _before(self, fault: Fault, frame: Frame) -> Frame:
        """What happens before the call has arrived; the call that goes on."""
        self._happen(fault)
        return corrupted(frame, fault.pick) if fault.deed is Deed.CORRUPT else frame

    def _after(self, fault: Fault, frame: Frame) -> None:
        """What happens once the call is on its way."""
        self._happen(fault)
        if fault.deed is Deed.CORRUPT:
            # A second call of the same name with other content.
            self._deliver(corrupted(frame, fault.pick))

    def _happen(self, fault: Fault) -> None:
        """What does not touch this call's content."""
        if fault.victim == SERVER:
            self._script.strike(fault)
        elif fault.deed in (Deed.KILL, Deed.VANISH):
            raise Killed(fault)
        elif fault.deed is Deed.PAUSE:
            time.sleep(fault.seconds)
        elif fault.deed is Deed.REPLAY:
            self._replay(fault)
        self._change_link(fault)

    def _change_link(self, fault: Fault) -> None:
        now_s, link = time.monotonic(), self._link
        if fault.deed is Deed.SLOW:
            link.slow_until_s = now_s + fault.seconds
        if fault.deed not in (Deed.PARTITION, Deed.PARTITION_UP, Deed.PARTITION_DOWN):
            return
        link.cut_until_s = now_s + fault.seconds
        link.is_cut_up = fault.deed is not Deed.PARTITION_DOWN
        link.is_cut_down = fault.deed is not Deed.PARTITION_UP
        self._is_silent = fault.pick < 0.5
        timer = threading.Timer(_NOTICED_S, self.break_off, kwargs={"tells": fault.pick >= 0.5})
        timer.daemon = True
        timer.start()

    def _carry(self, frame: Frame, outer: Future[Frame], faults: Sequence[Fault]) -> None:
        deeds = {fault.deed for fault in faults}
        if self._is_broken or (self._link.is_cut and self._link.is_cut_up):
            self._give_up_later()
            return
        if Deed.REORDER in deeds:
            self._hold(frame, outer)
            return
        if Deed.LOSE_REPLY in deeds:
            self._deliver(frame).add_done_callback(lambda done: self.break_off())
            return
        self._deliver(frame).add_done_callback(lambda done: self._arrive(done, outer))
        if Deed.DUPLICATE in deeds:
            self._deliver(frame)

    def _hold(self, frame: Frame, outer: Future[Frame]) -> None:
        """Until the next call has gone, or for a while."""
        once = threading.Lock()

        def release() -> None:
            if once.acquire(blocking=False):
                self._deliver(frame).add_done_callback(lambda done: self._arrive(done, outer))

        self._held = release
        timer = threading.Timer(_HELD_S, release)
        timer.daemon = True
        timer.start()

    def _deliver(self, frame: Frame) -> Future[Frame]:
        self._gate.wait()
        return self._inner.call(frame)

    def _replay(self, fault: Fault) -> None:
        if self._link.past:
            chosen = random.Random(fault.pick).choice(self._link.past)
            if not self._is_broken:
                self._deliver(chosen)

    def _arrive(self, done: Future[Frame], outer: Future[Frame]) -> None:
        # On the server's thread: while it is paused, its thread stands still.
        self._gate.wait()
        if self._is_broken:
            return
        if self._link.is_cut and self._link.is_cut_down:
            self._give_up_later()
            return
        with self._lock:
            self._open.discard(outer)
        if outer.done():
            return
        error = done.exception()
        with suppress(CutlayerError):
            if error is None:
                outer.set_result(done.result())
            else:
                outer.set_exception(error)

    def _give_up_later(self) -> None:
        timer = threading.Timer(_NOTICED_S, self.break_off, kwargs={"tells": not self._is_silent})
        timer.daemon = True
        timer.start()
