"""A federation's calls at the server: one thread asks the coordinator, everybody else waits here.

It does not decide (`federation.coordinator`), compute (`host`) nor touch sockets. A call without
an answer yet is answered WAIT after some seconds: the client sends it again, and a dead link is
noticed on either side.
"""

import logging
import queue
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from cutlayer.errors import (
    ConfigError,
    CutlayerError,
    ProtocolError,
    StorageError,
    TransportError,
)
from cutlayer.federation.coordinator import Coordinator
from cutlayer.federation.cuts import Greeting
from cutlayer.federation.secure.peers import Verifier
from cutlayer.federation.settings import FederationSettings
from cutlayer.federation.status import Status
from cutlayer.federation.store import FederationStore
from cutlayer.federation.trunk_pool import TrunkPool
from cutlayer.metrics import FederationMetrics
from cutlayer.server.adoption import adopt
from cutlayer.storage.vault import Vault
from cutlayer.wire.channel import Peer
from cutlayer.wire.codec import get_codec
from cutlayer.wire.federation_messages import (
    Adopt,
    Adopted,
    Join,
    Leave,
    Left,
    Publish,
    Published,
    Wait,
)
from cutlayer.wire.frame import Frame
from cutlayer.wire.header import Header
from cutlayer.wire.messages import HEADERS
from cutlayer.wire.ring import decode_any, pack_ring

__all__ = ["FederationService", "federation_folder"]

_log = logging.getLogger(__name__)
_HOLD_S = 5.0
"""After this a call without an answer gets WAIT."""
_TICK_S = 1.0
_STOP_S = 30.0
_KIND_OF = {header: kind for kind, header in HEADERS.items()}


@dataclass(frozen=True, kw_only=True, eq=False)
class _Call:
    """A call that waits for its answer."""

    member: str
    frame: Frame
    future: "Future[Frame]"
    since_s: float
    greeting: Greeting | None


@dataclass(frozen=True, kw_only=True)
class _Notice:
    """A connection of a member began or ended."""

    member: str
    is_here: bool


class FederationService:
    """The coordinator of one federation, on a thread of its own."""

    def __init__(
        self,
        settings: FederationSettings,
        state_folder: Path,
        vault: Vault,
        trunk: TrunkPool,
        clock: Callable[[], float] = time.monotonic,
        metrics: FederationMetrics | None = None,
        verifier: Verifier | None = None,
    ) -> None:
        """Open the federation's store; rounds begin when members come.

        Args:
            settings: of the federation.
            state_folder: the server's; the store is a folder in it.
            vault: encryption at rest.
            trunk: whoever hosts the trunk.
            clock: seconds.
            metrics: told where the rounds stand.
            verifier: of members' signatures; None without certificates.

        Raises:
            StorageError: another process runs this federation, or its store is damaged.
            ConfigError: settings that do not fit together, or not the rounds so far.
        """
        self.settings = settings
        self._folder, self._vault, self._clock = state_folder, vault, clock
        self.store = FederationStore(
            federation_folder(state_folder, settings.name), settings.name, vault
        )
        self._coordinator = Coordinator(settings, self.store, trunk, clock(), verifier)
        self._arrivals: queue.Queue[_Call | _Notice | None] = queue.Queue()
        self._waiting: list[_Call] = []
        self._connections: Counter[str] = Counter()
        self._seen_version = -1
        self._closing = threading.Lock()
        self._is_closed = False
        self._reason: CutlayerError = TransportError("the server is shutting down; try again later")
        self._metrics = metrics
        self._status = self._coordinator.status()
        self._thread = threading.Thread(target=self._loop, name="federation", daemon=True)
        self._thread.start()

    def submit(self, peer: Peer, frame: Frame, greeting: Greeting | None = None) -> "Future[Frame]":
        """Start a call; its future gives the answer, or WAIT. Mixed cuts need the `greeting`.

        Raises:
            ConfigError: it is for another federation.
            TransportError: the server is shutting down.
            CutlayerError: the federation has stopped, and why.
        """
        name = getattr(frame.header, "federation", None)
        if name != self.settings.name:
            raise ConfigError(
                f"this server coordinates federation {self.settings.name}, not {name!r:.60}"
            )
        future: Future[Frame] = Future()
        call = _Call(
            member=peer.name, frame=frame, future=future, since_s=self._clock(), greeting=greeting
        )
        with self._closing:
            if self._is_closed:
                raise _again(self._reason)
            self._arrivals.put(call)
        return future

    def status(self) -> Status:
        """Where the federation stood a moment ago; any thread may ask."""
        return self._status

    def arrived(self, peer: Peer) -> None:
        """A connection of this peer was greeted; `lost` follows when it ends."""
        self._arrivals.put(_Notice(member=peer.name, is_here=True))

    def lost(self, peer: Peer) -> None:
        """A connection that had arrived has ended; its calls were cancelled."""
        self._arrivals.put(_Notice(member=peer.name, is_here=False))

    def close(self) -> None:
        """Answer no more; rounds that are finished are on disk."""
        with self._closing:
            self._is_closed = True
            self._arrivals.put(None)
        self._thread.join(_STOP_S)
        self.store.close()

    def _loop(self) -> None:
        try:
            while self._turn():
                pass
        except Exception as error:  # a top-level loop: else everybody would wait for ever
            _log.exception("the federation %s has stopped", self.settings.name)
            self._reason = error if isinstance(error, CutlayerError) else _stopped(error)
        self._end()

    def _turn(self) -> bool:
        """One arrival, or some seconds without one; False at the end."""
        try:
            arrived = self._arrivals.get(timeout=self._patience_s())
            if arrived is None:
                return False
            self._take_in(arrived)
        except queue.Empty:
            pass
        self._coordinator.tick(self._clock())
        self._answer_all()
        return True

    def _end(self) -> None:
        with self._closing:
            self._is_closed = True
        while not self._arrivals.empty():
            arrived = self._arrivals.get()
            if isinstance(arrived, _Call):
                self._waiting.append(arrived)
        for call in list(self._waiting):
            self._fail(call, _again(self._reason))

    def _patience_s(self) -> float:
        deadline_s = self._coordinator.next_deadline_s()
        if deadline_s is None:
            return _TICK_S
        return min(_TICK_S, max(0.0, deadline_s - self._clock()))

    def _take_in(self, arrived: _Call | _Notice) -> None:
        if isinstance(arrived, _Call):
            self._take(arrived)
        elif arrived.is_here:
            self._connections[arrived.member] += 1
            self._coordinator.seen(arrived.member)
        else:
            self._connections[arrived.member] -= 1
            self._forget(arrived.member)

    def _take(self, call: _Call) -> None:
        if call.future.cancelled():
            return
        self._waiting.append(call)
        try:
            reply = self._begin(call)
        except Exception as error:  # a top-level loop: a bug must not end all other members' rounds
            self._fail(call, error)
            return
        if reply is None:
            self._answer(call)
        else:
            self._finish(call, _frame(reply, {}))

    def _begin(self, call: _Call) -> Header | None:
        """The answer where it is immediate; else the coordinator has been told."""
        coordinator, now_s, header = self._coordinator, self._clock(), call.frame.header
        if isinstance(header, Join):
            return coordinator.join(call.member, header, now_s, call.greeting)
        if isinstance(header, Leave):
            coordinator.leave(call.member, now_s)
            return Left()
        if isinstance(header, Publish):
            coordinator.publish(call.member, header, now_s)
            return Published()
        if isinstance(header, Adopt):
            return self._adopt(call.member, header, call.greeting)
        tensors = {name: decode_any(packed) for name, packed in call.frame.tensors.items()}
        coordinator.submit(call.member, header, tensors, now_s)
        return None

    def _adopt(self, member: str, header: Adopt, greeting: Greeting | None) -> Adopted:
        # The run is opened with the connection's cut, whichever the member last joined with.
        cut = None if greeting is None else greeting.cut
        state, done = self._coordinator.trunk_state(member, cut), self._coordinator.status().round
        if header.round != done:
            raise ProtocolError(
                f"round {header.round} cannot be adopted: the federation's last finished round "
                f"is {done}"
            )
        adopt(
            self._folder, self._vault, member, header.run_id, header.round,
            self.settings.adapter, state, cut,
        )  # fmt: skip
        return Adopted(step=header.round)

    def _answer_all(self) -> None:
        if self._coordinator.version != self._seen_version:
            self._seen_version = self._coordinator.version
            self._observe()
            for call in list(self._waiting):
                self._answer(call)
        now_s = self._clock()
        for call in [c for c in self._waiting if now_s - c.since_s > _HOLD_S]:
            self._finish(call, _frame(Wait(), {}))

    def _observe(self) -> None:
        status, before = self._coordinator.status(), self._status
        self._status = status
        if self._metrics is None:
            return
        for number in range(before.round + 1, status.round + 1):
            row = self.store.round_row(number)
            assert row is not None
            self._metrics.rounds.inc()
            self._metrics.failed_attempts.inc(row.attempts - 1)
            self._metrics.stragglers.inc(len(row.stragglers))
        self._metrics.round.set(status.round + (1 if status.attempt else 0))
        self._metrics.waiting.set(len(status.waiting))
        self._metrics.members.set(sum(m.left_at is None for m in self.store.members()))

    def _answer(self, call: _Call) -> None:
        try:
            answer = self._coordinator.answer(call.member, call.frame.header)
        except CutlayerError as error:
            self._fail(call, error)
            return
        if answer is not None:
            self._finish(call, _frame(answer.header, answer.tensors))

    def _finish(self, call: _Call, reply: Frame) -> None:
        self._waiting.remove(call)
        self._coordinator.count_bytes(_num_bytes(call.frame), _num_bytes(reply))
        if call.future.set_running_or_notify_cancel():
            call.future.set_result(reply)

    def _fail(self, call: _Call, error: BaseException) -> None:
        self._waiting.remove(call)
        if call.future.set_running_or_notify_cancel():
            call.future.set_exception(error)

    def _forget(self, member: str) -> None:
        """Drop calls of the connection that has ended; the member may be here on another one."""
        ended = [call for call in self._waiting if call.future.cancelled()]
        self._waiting = [call for call in self._waiting if not call.future.cancelled()]
        waits = any(call.member == member for call in self._waiting)
        waited = any(call.member == member for call in ended)
        if not waits and (waited or self._connections[member] <= 0):
            self._coordinator.lost(member, self._clock())


def federation_folder(state_folder: Path, name: str) -> Path:
    """Where a server keeps a federation."""
    return state_folder / "federations" / name


def _stopped(error: Exception) -> CutlayerError:
    return StorageError(
        f"the federation has stopped at the server ({type(error).__name__}); its log says why. "
        "Rounds that were finished are kept: ask its operator to start it again"
    )


def _again(error: CutlayerError) -> CutlayerError:
    """A fresh one for each caller: a raised one carries its traceback."""
    return type(error)(str(error))


def _frame(header: Header, tensors: Mapping[str, Tensor]) -> Frame:
    raw = get_codec("raw")
    packed = {
        name: pack_ring(x) if x.dtype == torch.int64 else raw.encode(x)
        for name, x in tensors.items()
    }
    return Frame(kind=_KIND_OF[type(header)], header=header, tensors=packed)


def _num_bytes(frame: Frame) -> int:
    return sum(packed.num_bytes for packed in frame.tensors.values())
