"""The front of a hierarchical server: no trunk of its own, N replicas behind one address.

It greets clients, tells each its replica, and coordinates the federation if there is one. It does
not compute (`replica`), restart (`replica_group`) nor average (`federation`).
"""

import secrets
from collections.abc import Callable

from msgspec.structs import asdict
from prometheus_client import CollectorRegistry, generate_latest

from cutlayer.errors import ConfigError
from cutlayer.metrics import FederationMetrics
from cutlayer.model.manifest import Manifest
from cutlayer.server.admin_keys import REPLICA_HOST, AdminKeys, make_admin_keys
from cutlayer.server.attestation import attestation_of
from cutlayer.server.audit import Audit
from cutlayer.server.doors import Doors
from cutlayer.server.federation import FederationService
from cutlayer.server.federation_calls import verifier_of
from cutlayer.server.front_connection import FrontConnection, FrontDesk
from cutlayer.server.front_metrics import render_replicas
from cutlayer.server.handshake import ServedModel
from cutlayer.server.launchers import Launcher, LocalProcesses
from cutlayer.server.quota import DailyQuota
from cutlayer.server.replica_group import ReplicaGroup, ReplicaStatus
from cutlayer.server.replica_pool import ReplicaPool
from cutlayer.server.replica_settings import ReplicaEngine
from cutlayer.server.settings import ServerSettings
from cutlayer.storage.audit_log import AuditEvent, AuditLog
from cutlayer.storage.files import private_folder
from cutlayer.storage.vault import open_vault
from cutlayer.wire.channel import Channel, Connection, Peer
from cutlayer.wire.endpoints import ConnectionSettings
from cutlayer.wire.grpc_channel import GrpcChannel
from cutlayer.wire.messages import Welcome
from cutlayer.wire.replica_messages import Stats
from cutlayer.wire.spec import Spec

__all__ = ["TrunkFront", "make_launcher"]

_STOP_S = 10.0


class TrunkFront:
    """From settings to a listening front with its replicas; a `Service` as a `TrunkServer` is."""

    def __init__(
        self,
        settings: ServerSettings,
        launcher: Callable[[ServerSettings, AdminKeys], Launcher] | None = None,
    ) -> None:
        """Open the state folder; nothing runs yet.

        Args:
            settings: an ordinary server's, with `replicas.count` above 0.
            launcher: starts replicas; None takes the engine that the settings name.

        Raises:
            ConfigError: wrong settings or certificates.
            StorageError: the state folder is in use or open to others.
        """
        if settings.replicas.count < 1:
            raise ConfigError("replicas.count=0: a front needs at least one replica")
        self._settings = settings
        folder = private_folder(settings.state.folder)
        # Its lock keeps a second front off this folder; replicas have logs of their own.
        self._audit = Audit(AuditLog(folder / "audit.jsonl"))
        keys = make_admin_keys(private_folder(folder / "replicas") / "keys")
        make = launcher or make_launcher
        connect = _connect_by(keys, settings.listen.max_frame_bytes)
        self._group = ReplicaGroup(make(settings, keys), settings.replicas, connect)
        self.pool = ReplicaPool(self._group)
        self.federation: FederationService | None = None
        self._desk: FrontDesk | None = None
        self._attestation = attestation_of(settings.tee, settings.listen, self._audit)
        self._doors = Doors(settings, self._attestation)
        self._is_ready = False
        self._registry = CollectorRegistry()
        self._rounds = FederationMetrics(self._registry)

    @property
    def port(self) -> int:
        """Where clients connect."""
        return self._doors.port

    @property
    def health_port(self) -> int | None:
        """Where /healthz answers, if it does."""
        return self._doors.health_port

    @property
    def model(self) -> ServedModel:
        """What the replicas serve."""
        assert self._desk is not None
        return self._desk.model

    def replicas(self) -> tuple[ReplicaStatus, ...]:
        """The replicas as they are now."""
        return self._group.status()

    def connect(self, peer: Peer) -> Connection:
        """Accept a peer; its calls are checked one by one."""
        assert self._desk is not None
        return FrontConnection(peer, self._desk)

    def start(self) -> None:
        """Start the replicas, then listen.

        Raises:
            ConfigError: an address is taken, or settings or certificates are unusable.
            CutlayerError: a replica did not start.
        """
        settings = self._settings
        self._doors.prepare(self, self.is_ready, self.metrics)
        welcome = self._group.start()
        # It asks a replica for the adapter's layout.
        self.federation = self._coordinate()
        self._desk = FrontDesk(
            model=_served(welcome, settings.model.digest),
            place=self._place,
            federation=self.federation,
            quota=DailyQuota(settings.limits.max_client_bytes_per_day),
            audit=self._audit,
            attestation=self._attestation,
        )
        self._doors.listen()
        self._is_ready = True
        self._audit.record(AuditEvent.STARTED)

    def stop(self, grace_s: float | None = None) -> None:
        """Refuse new connections, let calls in flight finish, end the replicas."""
        self._is_ready = False
        drain_s = self._settings.drain_s if grace_s is None else grace_s
        self._doors.stop_listening(drain_s)
        if self.federation is not None:
            self.federation.close()
        self._group.stop(drain_s + _STOP_S if drain_s else 0.0)
        self._doors.close()
        self._audit.record(AuditEvent.STOPPED)
        self._audit.close()

    def is_ready(self) -> bool:
        """Whether it listens and some replica is up."""
        return self._is_ready and bool(self._group.links())

    def metrics(self) -> bytes:
        """Prometheus text."""
        return render_replicas(self.replicas()) + generate_latest(self._registry)

    def stats(self) -> Stats:
        """Load and counters: the sum over the replicas, as last heard."""
        heard = [asdict(r.stats) for r in self.replicas() if r.stats is not None]
        sums = {name: sum(table[name] for table in heard) for name in Stats.__struct_fields__}
        sums["num_connections"] += self._doors.num_streams
        return Stats(**sums)

    def assurance(self) -> str:
        """What its own evidence is worth; "none" where it proves nothing."""
        return "none" if self._attestation is None else self._attestation.label

    def runs(self) -> list[tuple[str, str, int]]:
        """Not known here: the replicas have them."""
        return []

    def _coordinate(self) -> FederationService | None:
        settings = self._settings
        if settings.federation is None:
            return None
        vault = open_vault(settings.state.key_file)
        return FederationService(
            settings.federation,
            settings.state.folder,
            vault,
            self.pool,
            metrics=self._rounds,
            verifier=verifier_of(settings),
        )

    def _place(self, client: str) -> str:
        address = self._group.place(client).address
        # Before the client can open its run there: the round's start must be known by then.
        self.pool.follow(client)
        return address


def make_launcher(settings: ServerSettings, keys: AdminKeys) -> Launcher:
    """The engine that the settings name.

    Raises:
        ConfigError: it is not installed, or clients could not reach the replicas.
    """
    if settings.replicas.engine is ReplicaEngine.PROCESS:
        return LocalProcesses(settings, keys)
    # Imported late: ray is an extra, and starts slowly.
    from cutlayer.server.ray_launcher import RayActors

    return RayActors(settings, keys)


def _connect_by(keys: AdminKeys, max_frame_bytes: int) -> Callable[[str], Channel]:
    def connect(address: str) -> Channel:
        return GrpcChannel(
            ConnectionSettings(
                address=address,
                tls=keys.front,
                server_name=REPLICA_HOST,
                codec="raw",
                max_frame_bytes=max_frame_bytes,
            )
        )

    return connect


def _served(welcome: Welcome, digest: str | None) -> ServedModel:
    return ServedModel(
        spec=Spec.from_table(welcome.spec),
        manifest=Manifest(dict(welcome.leaves)),
        digest=digest,
        boot_id=secrets.token_hex(16),
        software=welcome.software,
    )
