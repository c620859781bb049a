"""Keeps the replicas of a front running, and knows which of them serves whom.

It does not start processes by itself (`launchers`), choose by load (`placement`) nor speak with
clients (`front`). A replica that hangs is killed before its clients get another: two replicas must
never save steps of one run.
"""

import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from cutlayer.errors import CutlayerError, TransportError
from cutlayer.server.launchers import Launched, Launcher
from cutlayer.server.placement import Placement
from cutlayer.server.replica_link import ReplicaLink
from cutlayer.server.replica_settings import ReplicaSettings
from cutlayer.wire.channel import Channel
from cutlayer.wire.messages import Welcome
from cutlayer.wire.replica_messages import Stats

__all__ = ["Placed", "ReplicaGroup", "ReplicaStatus"]

_log = logging.getLogger(__name__)
_CHECK_S = 0.5
_GREET_S = 1.0
_SHORTEST_DELAY_S = 0.5
_LONGEST_DELAY_S = 60.0


@dataclass(frozen=True, kw_only=True)
class Placed:
    """A client's replica, as it runs now."""

    address: str
    """host:port for the client."""
    link: ReplicaLink
    """Another one after a restart: the memory of the one before is gone."""


@dataclass(frozen=True, kw_only=True)
class ReplicaStatus:
    """One replica, for pages and metrics."""

    index: int
    pid: int | None
    """None while it is down."""
    address: str
    """host:port for clients; empty while it is down."""
    num_restarts: int
    clients: tuple[str, ...]
    """Who is placed on it."""
    stats: Stats | None
    """As last heard in its present life."""


@dataclass(frozen=True, kw_only=True)
class _Life:
    """A replica from one start to its end."""

    launched: Launched
    link: ReplicaLink
    began_s: float


@dataclass
class _Slot:
    """One of the `count` replicas, through all its lives."""

    index: int
    life: _Life | None = None
    stats: Stats | None = None
    num_restarts: int = 0
    delay_s: float = 0.0


class ReplicaGroup:
    """All replicas of one front. Thread-safe."""

    def __init__(
        self,
        launcher: Launcher,
        settings: ReplicaSettings,
        connect: Callable[[str], Channel],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Nothing runs yet.

        Args:
            launcher: starts them.
            settings: how many, and how patient to be.
            connect: opens a channel to a replica's `admin_address`.
            clock: seconds.
        """
        self._launcher = launcher
        self._settings = settings
        self._connect = connect
        self._clock = clock
        self._placement = Placement()
        self._slots = [_Slot(index) for index in range(settings.count)]
        self._lock = threading.RLock()
        self._is_closing = threading.Event()
        self._watchers: list[threading.Thread] = []

    def start(self) -> Welcome:
        """Start all replicas and wait for them; what they serve.

        Raises:
            CutlayerError: one did not start; none is left running.
        """
        try:
            with ThreadPoolExecutor(len(self._slots)) as pool:
                for life in [pool.submit(self._begin, slot) for slot in self._slots]:
                    life.result()
            welcome = self.links()[0].describe()
        except BaseException:
            self.stop(0.0)
            raise
        for slot in self._slots:
            name = f"replica-{slot.index}"
            watcher = threading.Thread(target=self._watch, args=(slot,), name=name, daemon=True)
            self._watchers.append(watcher)
            watcher.start()
        return welcome

    def place(self, client: str) -> Placed:
        """The client's replica; another one at once if the one before has died.

        Raises:
            TransportError: no replica is up; one will be soon.
        """
        while (found := self._life_of(client)) is not None:
            slot, life = found
            if _answers(life):
                return Placed(address=life.launched.address, link=life.link)
            self._bury(slot, life)
        raise TransportError("no replica of this server is up; try again soon")

    def links(self) -> list[ReplicaLink]:
        """Links to all replicas that are up."""
        with self._lock:
            return [slot.life.link for slot in self._slots if slot.life is not None]

    def status(self) -> tuple[ReplicaStatus, ...]:
        """All replicas as they are now."""
        with self._lock:
            return tuple(self._status(slot) for slot in self._slots)

    def stop(self, grace_s: float) -> None:
        """End all replicas, at the same time; each gets `grace_s` for its calls in flight."""
        self._is_closing.set()
        with self._lock:
            lives = [slot.life for slot in self._slots if slot.life is not None]
            for slot in self._slots:
                slot.life = None
        with ThreadPoolExecutor(max(1, len(lives))) as pool:
            list(pool.map(lambda life: self._end(life, grace_s), lives))
        for watcher in self._watchers:
            watcher.join()
        self._launcher.close()

    def _life_of(self, client: str) -> tuple[_Slot, _Life] | None:
        with self._lock:
            index = self._placement.place(client, self._clock())
            slot = None if index is None else self._slots[index]
            # None also while the group is stopping.
            return None if slot is None or slot.life is None else (slot, slot.life)

    def _begin(self, slot: _Slot) -> None:
        launched = self._launcher.launch(slot.index)
        try:
            link = ReplicaLink(self._connect(launched.admin_address))
        except BaseException:
            launched.kill()
            raise
        life = _Life(launched=launched, link=link, began_s=self._clock())
        with self._lock:
            if not self._is_closing.is_set():
                slot.life, slot.stats = life, None
                self._placement.mark_up(slot.index, life.began_s)
                return
        self._end(life, 0.0)

    def _watch(self, slot: _Slot) -> None:
        while not self._is_closing.is_set():
            life = slot.life
            if life is None:
                self._begin_again(slot)
            elif life.launched.wait(_CHECK_S):
                self._bury(slot, life)
            else:
                self._check(slot, life)

    def _check(self, slot: _Slot, life: _Life) -> None:
        try:
            stats = life.link.stats(self._settings.stall_s)
        except (CutlayerError, TimeoutError) as error:
            if self._is_closing.is_set() or life.launched.wait(_CHECK_S):
                return
            _log.warning("replica %d does not answer and is killed: %s", slot.index, error)
            self._bury(slot, life)
            return
        with self._lock:
            slot.stats = stats
            self._placement.note_tokens(slot.index, stats.num_tokens, self._clock())

    def _bury(self, slot: _Slot, life: _Life) -> None:
        # Also one that seems dead: it must save nothing once its clients are elsewhere.
        life.launched.kill()
        with self._lock:
            if slot.life is not life or self._is_closing.is_set():
                return
            slot.life, slot.stats = None, None
            moved = self._placement.mark_down(slot.index)
        life.link.close()
        _log.warning("replica %d has died; %d clients get another one", slot.index, len(moved))
        has_lived = self._clock() - life.began_s > _LONGEST_DELAY_S
        slot.delay_s = 0.0 if has_lived else slot.delay_s

    def _begin_again(self, slot: _Slot) -> None:
        delay_s = max(slot.delay_s, self._settings.restart_delay_s)
        if self._is_closing.wait(delay_s):
            return
        # From 0 it would never grow, and one that dies at once would be started without end.
        slot.delay_s = min(max(2 * delay_s, _SHORTEST_DELAY_S), _LONGEST_DELAY_S)
        slot.num_restarts += 1
        try:
            self._begin(slot)
        except CutlayerError as error:
            _log.warning("replica %d cannot be started again yet: %s", slot.index, error)

    def _end(self, life: _Life, grace_s: float) -> None:
        life.link.close()
        life.launched.stop(grace_s)

    def _status(self, slot: _Slot) -> ReplicaStatus:
        launched = None if slot.life is None else slot.life.launched
        return ReplicaStatus(
            index=slot.index,
            pid=None if launched is None else launched.pid,
            address="" if launched is None else launched.address,
            num_restarts=slot.num_restarts,
            clients=tuple(self._placement.clients_of(slot.index)),
            stats=slot.stats,
        )


def _answers(life: _Life) -> bool:
    """Whether a client may be sent there. Its link breaks before the system reports its death."""
    if life.launched.wait(0.0):
        return False
    try:
        life.link.stats(_GREET_S)
    except TimeoutError:  # busy or hanging: the watcher finds out
        return True
    except CutlayerError:
        return False
    return True
