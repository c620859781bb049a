"""The certificate that a server shows before anything is sent to it, and the pin to exactly that.

It does not judge certificates (`tee.ra_tls`), nor carry frames (`grpc_channel`).
"""

import socket
import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

from cutlayer.errors import ConfigError, PermissionRefused, TransportError
from cutlayer.wire.endpoints import ConnectionSettings

__all__ = ["Pin", "shown_certificate"]


@dataclass(frozen=True, kw_only=True)
class Pin:
    """The only server certificate that a channel accepts."""

    certificate: bytes
    """PEM, self-signed."""
    name: str
    """A DNS name that it carries."""


def shown_certificate(settings: ConnectionSettings) -> bytes:
    """The server's certificate, DER, from a handshake of its own that ends there.

    This side shows none: whoever answers has proved nothing yet. TLS 1.3 alone lets a client see
    the server's before that is missed.

    Raises:
        ConfigError: without tls files.
        TransportError: nobody answers.
        PermissionRefused: whoever answers does not speak TLS 1.3.
    """
    if settings.tls is None:
        raise ConfigError("evidence needs TLS: there is no key that it could vouch for; set tls")
    try:
        with (
            socket.create_connection(_host_port(settings), settings.connect_timeout_s) as plain,
            _context().wrap_socket(
                plain, server_hostname=settings.server_name, do_handshake_on_connect=False
            ) as secure,
            _deadline(secure, settings.connect_timeout_s),
        ):
            secure.do_handshake()
            found = secure.getpeercert(binary_form=True)
    except ssl.SSLEOFError as error:
        raise TransportError(f"{settings.address} hung up in the TLS handshake") from error
    except ssl.SSLError as error:
        raise PermissionRefused(
            f"{settings.address}: the server does not answer with TLS 1.3 ({error.reason}); check "
            "the port"
        ) from error
    except OSError as error:
        reason = error.strerror or error
        raise TransportError(f"{settings.address} does not answer: {reason}") from error
    if found is None:
        raise PermissionRefused(f"{settings.address} shows no certificate")
    return found


def _host_port(settings: ConnectionSettings) -> tuple[str, int]:
    host, _, port = settings.address.rpartition(":")
    return host.strip("[]"), int(port)


def _context() -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    # The verdict is over the certificate's evidence; nothing is sent before it.
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    context.set_alpn_protocols(["h2"])
    return context


@contextmanager
def _deadline(secure: ssl.SSLSocket, timeout_s: float) -> Iterator[None]:
    """Of the whole handshake: a socket's own timeout begins anew with each byte of a slow peer."""
    ended = threading.Event()

    def end() -> None:
        ended.set()
        with suppress(OSError):
            # Not its own method, which another thread must not call within a handshake.
            socket.socket.shutdown(secure, socket.SHUT_RDWR)

    alarm = threading.Timer(timeout_s, end)
    alarm.daemon = True
    alarm.start()
    try:
        yield
    except OSError as error:
        if ended.is_set():
            raise TransportError(f"no TLS handshake within {timeout_s:g} s") from error
        raise
    finally:
        alarm.cancel()
