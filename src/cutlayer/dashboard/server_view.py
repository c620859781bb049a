"""The two kinds of server as the page's `ServerView`: one trunk, or a front with its replicas.

It reads public names only, listed in two Protocols, and changes nothing.
"""

import time
from collections.abc import Sequence
from importlib.metadata import version
from typing import TYPE_CHECKING, Protocol

from cutlayer.dashboard.federation_view import federation_view
from cutlayer.dashboard.view import FederationView, ReplicaView, RunView, Snapshot
from cutlayer.federation.settings import FederationSettings
from cutlayer.federation.status import Status
from cutlayer.federation.store import FederationStore
from cutlayer.federation.store_reader import StoreReader
from cutlayer.metrics import Totals
from cutlayer.wire.replica_messages import Stats

if TYPE_CHECKING:
    from cutlayer.server.replica_group import ReplicaStatus

__all__ = ["FederationLike", "OneServerView", "ServerLike"]


class FederationLike(Protocol):
    """What the page asks of a coordinator's service; any thread may call."""

    @property
    def settings(self) -> FederationSettings:
        """Of the federation."""

    @property
    def store(self) -> StoreReader:
        """Rounds, members, published numbers."""

    def status(self) -> Status:
        """Where it stands; a copy."""


class ServerLike(Protocol):
    """What the page asks of a trunk server or a front; any thread may call."""

    def is_ready(self) -> bool:
        """Whether it takes calls."""

    def metrics(self) -> bytes:
        """Prometheus text."""

    def stats(self) -> Stats:
        """Load and counters; a front's are the sum over its replicas."""

    def runs(self) -> Sequence[tuple[str, str, int]]:
        """Owner, run id and step of each run in memory."""

    def replicas(self) -> "Sequence[ReplicaStatus]":
        """A front's replicas; none at a trunk server."""

    def assurance(self) -> str:
        """What its own evidence is worth; "none" where it proves nothing."""


class OneServerView:
    """Implements `ServerView`."""

    def __init__(self, server: ServerLike, federation: FederationLike | None) -> None:
        """Open the federation's store a second time: a page that reads holds no writer up.

        Args:
            server: what serves.
            federation: the coordinator's service, if there is one.

        Raises:
            StorageError: the store cannot be read.
        """
        self._server = server
        self._federation = federation
        self._store: StoreReader | None = None
        if federation is not None:
            self._store = FederationStore.read_only(federation.store.folder)
        self._began_s = time.monotonic()
        self._software = f"cutlayer {version('cutlayer')}"

    def close(self) -> None:
        """Close the store."""
        if self._store is not None:
            self._store.close()

    def is_ready(self) -> bool:
        """Whether it takes calls."""
        return self._server.is_ready()

    def metrics(self) -> bytes:
        """Prometheus text."""
        return self._server.metrics()

    def totals(self) -> Totals:
        """Counters since the start."""
        return _totals(self._server.stats())

    def snapshot(self) -> Snapshot:
        """The server now.

        Raises:
            StorageError: the federation's store cannot be read.
        """
        stats = self._server.stats()
        return Snapshot(
            software=self._software,
            time_s=time.time(),
            uptime_s=time.monotonic() - self._began_s,
            is_ready=self._server.is_ready(),
            num_connections=stats.num_connections,
            num_sessions=stats.num_sessions,
            cache_bytes=stats.cache_bytes,
            graph_bytes=stats.graph_bytes,
            totals=_totals(stats),
            runs=tuple(
                RunView(owner=owner, run_id=run_id, step=step)
                for owner, run_id, step in sorted(self._server.runs())
            ),
            replicas=tuple(_replica(replica) for replica in self._server.replicas()),
            federation=self._federation_now(),
            assurance=self._server.assurance(),
        )

    def _federation_now(self) -> FederationView | None:
        if self._federation is None or self._store is None:
            return None
        return federation_view(self._store, self._federation.settings, self._federation.status())


def _totals(stats: Stats) -> Totals:
    return Totals(tokens=stats.num_tokens, bytes_up=stats.bytes_up, bytes_down=stats.bytes_down)


def _replica(status: "ReplicaStatus") -> ReplicaView:
    return ReplicaView(
        name=f"replica {status.index}",
        is_alive=status.pid is not None,
        members=tuple(sorted(status.clients)),
        num_restarts=status.num_restarts,
    )
