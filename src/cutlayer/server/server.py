"""A trunk server: loads its blocks, listens, answers, drains.

It does not parse frames (`connection`) nor compute (`host`, on the runner's thread).
"""

import secrets
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from cutlayer.federation.trunk_pool import TrunkPool
from cutlayer.metrics import ServerMetrics
from cutlayer.model.agreement import known_manifest
from cutlayer.model.partition import Cut, Trunk
from cutlayer.model.quantised import weight_bytes
from cutlayer.model.threads import set_threads
from cutlayer.server.attestation import attestation_of
from cutlayer.server.audit import Audit
from cutlayer.server.connection import ClientConnection, ServerDesk
from cutlayer.server.doors import Doors
from cutlayer.server.federation import FederationService
from cutlayer.server.federation_calls import verifier_of
from cutlayer.server.handshake import ServedModel
from cutlayer.server.host import TrunkHost
from cutlayer.server.local_pool import LocalPool
from cutlayer.server.owner_vaults import OwnerVaults
from cutlayer.server.quota import DailyQuota
from cutlayer.server.replica_admin import AdminService
from cutlayer.server.runner import Runner
from cutlayer.server.scheduler import BatchScheduler
from cutlayer.server.settings import ServerSettings
from cutlayer.server.tensor_parallel import is_parallel, parallel_trunk, stop_followers, when_lost
from cutlayer.storage.audit_log import AuditEvent, AuditLog
from cutlayer.storage.files import private_folder
from cutlayer.storage.vault import Vault, open_vault
from cutlayer.tee.masked.hook import mask_parts, release_parts
from cutlayer.tee.private_model.source import ExportGate, open_model
from cutlayer.trace import NoTrace, Tracer
from cutlayer.wire.channel import Connection, Peer
from cutlayer.wire.replica_messages import Stats
from cutlayer.wire.spec import Spec

if TYPE_CHECKING:
    from cutlayer.server.replica_group import ReplicaStatus

__all__ = ["TrunkServer"]


class TrunkServer:
    """From settings to a listening server; also the `Service` that loopback channels use."""

    def __init__(self, settings: ServerSettings, tracer: Tracer | None = None) -> None:
        """Load the trunk and open the state folder; nothing listens yet.

        Args:
            settings: everything about this server.
            tracer: where the timeline of the trunk's calls goes.

        Raises:
            ConfigError: wrong settings, model or certificates.
            StorageError: the state folder is in use or open to others.
        """
        self._settings = settings
        self._tracer = tracer or NoTrace()
        set_threads(settings.model.threads)
        folder = private_folder(settings.state.folder)
        vault = open_vault(settings.state.key_file)
        trunk, self._model = self._load(settings)
        self._trunk = trunk
        trunk.decode_threads = settings.model.decode_threads
        self._audit = Audit(AuditLog(folder / "audit.jsonl"))
        vaults = OwnerVaults(vault)
        attestation = attestation_of(settings.tee, settings.listen, self._audit, vaults)
        self._metrics = ServerMetrics()
        self._host = TrunkHost(
            trunk,
            settings.limits,
            folder,
            vaults,
            tracer=self._tracer,
            observe=self._metrics.observe_batch,
            observe_decode=self._metrics.observe_decode,
        )
        batch = settings.batch.for_trunk(settings.model.device, self._host.can_share)
        self._runner = Runner(BatchScheduler(batch), chore=self._host.sweep)
        self.federation = self._coordinate(settings, folder, vault)
        self._desk = ServerDesk(
            model=self._model,
            host=self._host,
            runner=self._runner,
            quota=DailyQuota(
                settings.limits.max_client_bytes_per_day,
                settings.limits.max_client_vectors_per_day,
            ),
            audit=self._audit,
            metrics=self._metrics,
            federation=self.federation,
            attestation=attestation,
            exports=ExportGate(settings.private_model),
        )
        self._doors = Doors(settings, attestation)
        self._is_ready = False

    @property
    def port(self) -> int:
        """Where clients connect."""
        return self._doors.port

    @property
    def health_port(self) -> int | None:
        """Where /healthz answers, if it does."""
        return self._doors.health_port

    def is_ready(self) -> bool:
        """Whether it takes calls."""
        return self._is_ready

    @property
    def model(self) -> ServedModel:
        """What the server tells in the handshake."""
        return self._model

    def runs(self) -> list[tuple[str, str, int]]:
        """Owner, run id and step of each run in memory."""
        return self._host.runs()

    def replicas(self) -> "tuple[ReplicaStatus, ...]":
        """None: this server computes itself."""
        return ()

    def assurance(self) -> str:
        """What its own evidence is worth; "none" where it proves nothing."""
        return "none" if self._desk.attestation is None else self._desk.attestation.label

    def admin(self) -> AdminService:
        """What a front may order this server to do, if it is one of its replicas."""
        return AdminService(self._model, self._host, self._runner, self.stats)

    def connect(self, peer: Peer) -> Connection:
        """Accept a peer; its calls are checked one by one."""
        return ClientConnection(peer, self._desk)

    def when_lost(self, callback: Callable[[str], None]) -> None:
        """Call back with the reason when a process that shares the trunk is gone."""
        when_lost(self._trunk, callback)

    def start(self) -> None:
        """Listen.

        Raises:
            ConfigError: the address is taken, or the certificates are unusable.
        """
        self._doors.prepare(self, self.is_ready, self.metrics)
        self._doors.listen()
        self._is_ready = True
        self._audit.record(AuditEvent.STARTED)

    def stop(self, grace_s: float | None = None) -> None:
        """Refuse new connections, let calls in flight finish, close the files."""
        self._is_ready = False
        self._doors.stop_listening(self._settings.drain_s if grace_s is None else grace_s)
        if self.federation is not None:
            self.federation.close()
        self._runner.close()
        stop_followers(self._trunk)
        release_parts(self._trunk)
        self._doors.close()
        self._audit.record(AuditEvent.STOPPED)
        self._audit.close()

    def stats(self) -> Stats:
        """Load and counters."""
        totals, host = self._metrics.totals(), self._host
        return Stats(
            num_tokens=round(totals.tokens),
            bytes_up=round(totals.bytes_up),
            bytes_down=round(totals.bytes_down),
            num_waiting=self._runner.num_waiting,
            num_connections=self._doors.num_streams,
            num_runs=len(host.runs()),
            num_sessions=host.sessions.num_sessions,
            cache_bytes=host.sessions.cache_bytes,
            graph_bytes=host.graph_bytes,
        )

    def _load(self, settings: ServerSettings) -> tuple[Trunk, ServedModel]:
        return _load(settings)

    def _coordinate(
        self, settings: ServerSettings, folder: Path, vault: Vault
    ) -> FederationService | None:
        if settings.federation is None:
            return None
        metrics = self._metrics.federation
        return FederationService(
            settings.federation,
            folder,
            vault,
            self._pool(),
            metrics=metrics,
            verifier=verifier_of(settings),
        )

    def _pool(self) -> TrunkPool:
        """Where rounds find what members' runs have learnt."""
        return LocalPool(self._host, self._runner)

    def metrics(self) -> bytes:
        """Prometheus text."""
        metrics, host = self._metrics, self._host
        metrics.runs.set(len(host.runs()))
        metrics.sessions.set(host.sessions.num_sessions)
        metrics.session_rows.set(host.sessions.num_rows)
        metrics.cache_bytes.set(host.sessions.cache_bytes)
        metrics.evictions.set(host.sessions.num_evictions)
        metrics.graph_bytes.set(host.graph_bytes)
        metrics.connections.set(self._doors.num_streams)
        return metrics.render()


def _load(settings: ServerSettings) -> tuple[Trunk, ServedModel]:
    model = settings.model
    cut = Cut(model.lower, model.upper)
    attester = None if settings.tee is None else settings.tee.attester
    private, is_masked = settings.private_model, settings.masked is not None
    folder = open_model(model.path, model.revision, private, attester, is_masked)
    trunk = parallel_trunk(folder, cut, model.dtype, model.device, weights=model.trunk_weights)
    mask_parts(settings.masked, trunk)
    manifest = known_manifest(folder, trunk.leaves)
    return trunk, ServedModel(
        spec=Spec(
            model_type=folder.config.model_type,
            n_block=folder.config.num_hidden_layers,
            lower=cut.lower,
            upper=cut.upper,
            hidden_size=trunk.hidden_size,
            dtype=model.trunk_weights.told(model.dtype),
            codec_up="raw",
            codec_down="raw",
        ),
        manifest=manifest,
        digest=model.digest,
        boot_id=secrets.token_hex(16),
        software=f"cutlayer {version('cutlayer')}",
        has_one_cut=is_parallel(),
        weight_bytes=weight_bytes(trunk),
    )
