"""Where a simulated federation runs: threads over loopback channels, or processes over mutual TLS.

Server and clients are the product's own in both; only what carries their frames differs. It does
not know settings files nor scores.
"""

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Protocol

from cutlayer.client.client import Client
from cutlayer.client.settings import ClientSettings
from cutlayer.client.train import Report
from cutlayer.errors import PermissionRefused
from cutlayer.server.server import TrunkServer
from cutlayer.server.settings import ServerSettings
from cutlayer.settings import Settings
from cutlayer.simulation.parties import owner_at
from cutlayer.simulation.processes import serving, train_in_processes
from cutlayer.simulation.results import Training, training_of
from cutlayer.simulation.settings_text import settings_text
from cutlayer.simulation.timeline import Timeline
from cutlayer.storage.files import write_atomic
from cutlayer.wire.channel import Channel, LoopbackChannel, Peer

__all__ = ["ProcessWorld", "ThreadWorld", "World", "process_world", "thread_world"]

Say = Callable[[str], None]
Clients = dict[str, Client]
_ROLES = frozenset({"train", "generate"})


class World(Protocol):
    """A running server, and how owners reach it."""

    def clients(self, owners: Mapping[str, ClientSettings]) -> AbstractContextManager[Clients]:
        """Owners in this process, closed when the block ends."""

    def train(self, owners: Mapping[str, ClientSettings], kind: str) -> dict[str, Training]:
        """Train all owners at once; the first that fails ends all."""


class ThreadWorld:
    """Server and owners are threads of this process; frames are encoded all the same."""

    def __init__(self, server: TrunkServer, timeline: Timeline, say: Say) -> None:
        self._server, self._timeline, self._say = server, timeline, say
        self._is_over = threading.Event()
        self._channels: list[Channel] = []

    @contextmanager
    def clients(self, owners: Mapping[str, ClientSettings]) -> Iterator[Clients]:
        """See `World`."""
        with ExitStack() as stack:
            yield {name: stack.enter_context(self._open(name, own)) for name, own in owners.items()}

    def train(self, owners: Mapping[str, ClientSettings], kind: str) -> dict[str, Training]:
        """See `World`."""
        # All are built before one trains: where one cannot be, nobody has sent anything.
        with (
            self.clients(owners) as clients,
            ThreadPoolExecutor(len(owners), thread_name_prefix="owner") as pool,
        ):
            futures = {n: pool.submit(self._train, n, c, kind) for n, c in clients.items()}
            try:
                done, _ = wait(futures.values(), return_when=FIRST_EXCEPTION)
                for future in done:
                    future.result()
            except BaseException:
                # The others wait for an owner that will not come any more.
                self.cut_off()
                raise
        return {name: future.result() for name, future in futures.items()}

    @property
    def num_bytes(self) -> tuple[int, int]:
        """Bytes that all owners together have sent and received so far, rounds included."""
        channels = list(self._channels)
        return sum(c.bytes_sent for c in channels), sum(c.bytes_received for c in channels)

    def cut_off(self) -> None:
        """End every owner's connection; nobody connects again."""
        self._is_over.set()
        for channel in self._channels:
            channel.close()

    def _connect(self, name: str) -> Channel:
        if self._is_over.is_set():
            raise PermissionRefused("the simulation was stopped")
        peer = Peer(name=name, roles=_ROLES, serial=None, address="loopback")
        self._channels.append(LoopbackChannel(self._server, peer))
        return self._channels[-1]

    def _open(self, name: str, settings: ClientSettings) -> Client:
        tracer = self._timeline.of(name)
        return Client(settings, connect=lambda: self._connect(name), tracer=tracer)

    def _train(self, name: str, client: Client, kind: str) -> Training:
        shown = _Counted()
        began_s = time.monotonic()
        progress = client.train(shown.count)
        losses = [record.loss for record in progress.history]
        self._say(f"{name} trained {kind}: loss {losses[0]:.4f} to {losses[-1]:.4f}")
        return Training(
            loss_first=losses[0],
            loss_last=losses[-1],
            num_tokens=shown.num_tokens,
            seconds=time.monotonic() - began_s,
            bytes_up=client.trunk.bytes_sent,
            bytes_down=client.trunk.bytes_received,
            guarantee=client.guarantee,
        )


class ProcessWorld:
    """`cutlayer serve`, and `cutlayer train` for every owner; scores are taken in this process."""

    def __init__(self, address: str, folder: Path, timeline: Timeline, say: Say) -> None:
        self._address, self._folder = address, folder
        self._timeline, self._say = timeline, say

    @contextmanager
    def clients(self, owners: Mapping[str, ClientSettings]) -> Iterator[Clients]:
        """See `World`."""
        with ExitStack() as stack:
            yield {
                name: stack.enter_context(Client(owner_at(own, self._address)))
                for name, own in owners.items()
            }

    def train(self, owners: Mapping[str, ClientSettings], kind: str) -> dict[str, Training]:
        """See `World`."""
        configs = {name: self._folder / f"{name}-{kind}.toml" for name in owners}
        for name, own in owners.items():
            _write(owner_at(own, self._address), configs[name])
        traces = {name: self._timeline.file(f"{name}-{kind}") for name in owners}
        wanted = {name: path for name, path in traces.items() if path is not None}
        results = train_in_processes(configs, self._folder, wanted)
        trained = {name: training_of(result) for name, result in results.items()}
        for name, one in trained.items():
            self._say(f"{name} trained {kind}: loss {one.loss_first:.4f} to {one.loss_last:.4f}")
        return trained


@contextmanager
def thread_world(settings: ServerSettings, timeline: Timeline, say: Say) -> Iterator[ThreadWorld]:
    """A server in this process; it is gone when the block ends."""
    server = TrunkServer(settings, tracer=timeline.of("server"))
    world = ThreadWorld(server, timeline, say)
    try:
        yield world
    finally:
        world.cut_off()
        server.stop(grace_s=0)


@contextmanager
def process_world(
    settings: ServerSettings, folder: Path, timeline: Timeline, say: Say
) -> Iterator[World]:
    """A server as a process; it is gone when the block ends."""
    config = folder / "server.toml"
    _write(settings, config)
    with serving(config, folder, trace=timeline.file("server")) as server:
        yield ProcessWorld(server.address, folder, timeline, say)


class _Counted:
    """Tokens of the steps of this training."""

    def __init__(self) -> None:
        self.num_tokens = 0

    def count(self, report: Report) -> None:
        self.num_tokens += report.record.num_tokens


def _write(settings: Settings, path: Path) -> None:
    write_atomic(path, settings_text(settings).encode())
