"""Where a server is reached: by clients at its listener, by its operator at the health port.

It does not know what answers (`connection`, `front_connection`), nor when that is ready.
"""

from collections.abc import Callable

from cutlayer.identity.admission import Admission
from cutlayer.identity.revocation import RevocationList
from cutlayer.server.attestation import ServerAttestation
from cutlayer.server.health import HealthServer
from cutlayer.server.settings import ServerSettings
from cutlayer.wire.channel import Service
from cutlayer.wire.grpc_listener import GrpcListener

__all__ = ["Doors"]


class Doors:
    """Opened in two steps, so that the operator can watch a server that still prepares."""

    def __init__(
        self, settings: ServerSettings, attestation: ServerAttestation | None = None
    ) -> None:
        """Nothing is opened yet; clients are shown the attested certificate if there is one."""
        self._settings, self._attestation = settings, attestation
        self._listener: GrpcListener | None = None
        self._health: HealthServer | None = None

    @property
    def port(self) -> int:
        """Where clients connect."""
        assert self._listener is not None
        return self._listener.port

    @property
    def health_port(self) -> int | None:
        """Where /healthz answers, if it does."""
        return None if self._health is None else self._health.port

    @property
    def num_streams(self) -> int:
        """Connections that are open."""
        return 0 if self._listener is None else self._listener.num_streams

    def prepare(
        self, service: Service, is_ready: Callable[[], bool], metrics: Callable[[], bytes]
    ) -> None:
        """Answer the operator, and check everything that clients need.

        Args:
            service: what clients are connected to.
            is_ready: whether it takes calls.
            metrics: Prometheus text.

        Raises:
            ConfigError: the health port is taken, or the certificates are unusable.
        """
        settings = self._settings
        if settings.health_port is not None:
            self._health = HealthServer(settings.health_port, is_ready, metrics)
            self._health.start()
        admission, attestation = Admission(_revocations(settings)), self._attestation
        self._listener = GrpcListener(
            service,
            settings.listen,
            identify=admission.identify,
            is_allowed=lambda peer: admission.is_allowed(peer.serial),
            own_certificate=None if attestation is None else attestation.own_certificate,
        )

    def listen(self) -> None:
        """Let clients in.

        Raises:
            ConfigError: the address is taken.
        """
        assert self._listener is not None
        self._listener.start()

    def stop_listening(self, grace_s: float) -> None:
        """Refuse new connections and let calls in flight finish; the operator is still answered."""
        if self._listener is not None:
            self._listener.stop(grace_s)

    def close(self) -> None:
        """Answer the operator no more."""
        if self._health is not None:
            self._health.stop()


def _revocations(settings: ServerSettings) -> RevocationList | None:
    if settings.revoked is None or settings.listen.tls is None:
        return None
    return RevocationList(settings.revoked, settings.listen.tls.authority)
