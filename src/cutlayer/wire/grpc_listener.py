"""The server's end of gRPC: accepts streams over mutual TLS and hands them to a service.

It does not know certificates' contents: `identify` reads them and `is_allowed` judges them. Each
stream's own rules are in `served_stream`.
"""

import logging
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

import grpc

from cutlayer.errors import ConfigError, CutlayerError, PermissionRefused, TransportError
from cutlayer.wire.channel import Connection, Peer, Service
from cutlayer.wire.endpoints import ListenSettings, TlsFiles, check_security, read_tls
from cutlayer.wire.grpc_map import METHOD, OPENED, SERVICE, options, refuse
from cutlayer.wire.served_stream import ServedStream

__all__ = ["GrpcListener", "Holder"]

_log = logging.getLogger(__name__)
_SPARE_THREADS = 4
_PLAINTEXT_ROLES = frozenset({"train", "generate"})


class Holder(Protocol):
    """Whom a certificate names."""

    @property
    def name(self) -> str: ...
    @property
    def roles(self) -> frozenset[str]: ...
    @property
    def serial(self) -> int | None: ...
    @property
    def tls_key_sha256(self) -> bytes: ...


class GrpcListener:
    """Accepts connections for a service from `start` to `stop`."""

    def __init__(
        self,
        service: Service,
        settings: ListenSettings,
        *,
        identify: Callable[[bytes], Holder],
        is_allowed: Callable[[Peer], bool] = lambda peer: True,
        own_certificate: Callable[[], tuple[bytes, bytes]] | None = None,
    ) -> None:
        """Check the settings and the tls files; nothing is opened yet.

        Args:
            service: what peers are connected to.
            settings: address, tls files and limits.
            identify: reads the holder out of a client certificate in PEM form; raises
                PermissionRefused for one that it does not understand.
            is_allowed: asked at connect, at each frame and every `recheck_s`; False ends the
                peer's streams. It is called often and must be fast.
            own_certificate: key and certificate, PEM, to show in place of those in the files;
                asked at each handshake.

        Raises:
            ConfigError: insecure settings or unusable tls files.
        """
        check_security(settings)
        self._service = service
        self._settings = settings
        self._identify = identify
        self._is_allowed = is_allowed
        files = settings.tls
        self._credentials = None if files is None else _credentials(files, own_certificate)
        self._lock = threading.Lock()
        self._streams: set[ServedStream] = set()
        self._stopped = threading.Event()
        self._is_draining = False
        self._server = self._make_server()
        self._port = 0

    @property
    def port(self) -> int:
        """The port listened on, also where the settings ask for any (0)."""
        return self._port

    @property
    def num_streams(self) -> int:
        """Connections that are open."""
        return len(self._streams)

    def start(self) -> None:
        """Listen.

        Raises:
            ConfigError: the address cannot be bound.
        """
        address = self._settings.address
        try:
            if self._credentials is None:
                self._port = self._server.add_insecure_port(address)
            else:
                self._port = self._server.add_secure_port(address, self._credentials)
        except RuntimeError as error:
            raise ConfigError(
                f"cannot listen on {address}: the port is taken or the address is not this "
                "machine's; choose another one"
            ) from error
        self._server.start()
        threading.Thread(target=self._monitor, name="cutlayer-monitor", daemon=True).start()

    def stop(self, grace_s: float = 0.0) -> None:
        """Refuse new streams, let calls in flight finish for `grace_s`, then cut what is left."""
        self._is_draining = True
        for stream in self._snapshot():
            stream.drain()
        self._server.stop(grace_s).wait()
        self._stopped.set()

    def _make_server(self) -> grpc.Server:
        num_threads = self._settings.max_streams + _SPARE_THREADS
        server = grpc.server(
            ThreadPoolExecutor(num_threads, thread_name_prefix="cutlayer-stream"),
            options=[
                *options(self._settings),
                ("grpc.so_reuseport", 0),
                ("grpc.http2.min_ping_interval_without_data_ms", 5000),
                ("grpc.http2.min_recv_ping_interval_without_data_ms", 5000),
            ],
            maximum_concurrent_rpcs=num_threads,
        )
        handler = grpc.stream_stream_rpc_method_handler(self._serve)
        server.add_generic_rpc_handlers(
            (grpc.method_handlers_generic_handler(SERVICE, {METHOD: handler}),)
        )
        return server

    def _serve(self, requests: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
        try:
            peer, connection = self._accept(context)
        except CutlayerError as error:
            refuse(context, error)
        stream = ServedStream(connection, peer, self._settings, self._is_allowed, context.cancel)
        try:
            self._add(stream)
            if not context.add_callback(lambda: stream.end(None)):
                return
            context.send_initial_metadata((OPENED,))
            name = f"cutlayer-read-{peer.name}"
            threading.Thread(target=stream.read, args=(requests,), name=name, daemon=True).start()
            if self._is_draining:
                stream.drain()
            yield from stream.replies()
        except CutlayerError as error:
            _log.warning("stream of %s (%s) ended: %s", peer.name, peer.address, error)
            refuse(context, error)
        finally:
            stream.end(None)
            with self._lock:
                self._streams.discard(stream)
            connection.close()

    def _accept(self, context: grpc.ServicerContext) -> tuple[Peer, Connection]:
        if self._is_draining:
            raise TransportError("the server is stopping; try again soon")
        if len(self._streams) >= self._settings.max_streams:
            raise TransportError(
                f"the server has its {self._settings.max_streams} connections (listen.max_streams)"
            )
        peer = self._peer(context)
        if not self._is_allowed(peer):
            raise PermissionRefused(f"the certificate of {peer.name!r} is revoked or not valid")
        return peer, self._service.connect(peer)

    def _add(self, stream: ServedStream) -> None:
        """Nobody gets all connections; without certificates all have one name."""
        name, limit = stream.peer.name, self._settings.max_client_streams
        with self._lock:
            num_own = sum(other.peer.name == name for other in self._streams)
            if num_own >= limit and not self._settings.plaintext:
                raise TransportError(
                    f"{name} has its {limit} connections here (listen.max_client_streams)"
                )
            self._streams.add(stream)

    def _peer(self, context: grpc.ServicerContext) -> Peer:
        address = context.peer()
        if self._settings.plaintext:
            return Peer(name="plaintext", roles=_PLAINTEXT_ROLES, serial=None, address=address)
        (pem,) = context.auth_context()["x509_pem_cert"]
        holder = self._identify(pem)
        return Peer(
            name=holder.name,
            roles=holder.roles,
            serial=holder.serial,
            address=address,
            tls_key_sha256=holder.tls_key_sha256,
        )

    def _snapshot(self) -> list[ServedStream]:
        with self._lock:
            return list(self._streams)

    def _monitor(self) -> None:
        while not self._stopped.wait(self._settings.recheck_s):
            for stream in self._snapshot():
                stream.check(time.monotonic())


OwnCertificate = Callable[[], tuple[bytes, bytes]]


def _credentials(files: TlsFiles, own: OwnCertificate | None) -> grpc.ServerCredentials:
    """Credentials that follow the files: a renewed certificate serves the next connection."""
    loaded = _Loaded(files, own)
    return grpc.dynamic_ssl_server_credentials(
        loaded.read(), loaded.read_if_changed, require_client_authentication=True
    )


class _Loaded:
    """The tls files as last read, and the certificate that is shown in place of theirs."""

    def __init__(self, files: TlsFiles, own: OwnCertificate | None) -> None:
        self._files = files
        self._own = own
        self._shown = None if own is None else own()
        self._stamp = self._stat()

    def read(self) -> grpc.ServerCertificateConfiguration:
        key, certificate, authority = read_tls(self._files)
        if self._shown is not None:
            key, certificate = self._shown
        return grpc.ssl_server_certificate_configuration([(key, certificate)], authority)

    def read_if_changed(self) -> grpc.ServerCertificateConfiguration | None:
        """New credentials, or None to keep the old ones: also while the files do not fit yet."""
        stamp, shown = self._stat(), None if self._own is None else self._own()
        if stamp == self._stamp and shown == self._shown:
            return None
        self._shown = shown
        try:
            configuration = self.read()
        except ConfigError as error:
            _log.warning("keeping the old certificate: %s", error)
            return None
        self._stamp = stamp
        _log.info("serving the renewed certificate %s", self._files.certificate)
        return configuration

    def _stat(self) -> tuple[tuple[int, int, int], ...]:
        stamps = []
        for path in (self._files.certificate, self._files.key, self._files.authority):
            try:
                status = path.stat()
            except OSError:
                stamps.append((0, 0, 0))
            else:
                stamps.append((status.st_mtime_ns, status.st_size, status.st_ino))
        return tuple(stamps)
