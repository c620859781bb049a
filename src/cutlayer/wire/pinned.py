"""The certificate that a server shows before anything is sent to it, and the pin to exactly that.

It does not judge certificates (`tee.ra_tls`), nor carry frames (`grpc_channel`).
"""

import socket
import ssl
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
            # The timeout is that of the whole handshake, however slowly its bytes come.
            _context().wrap_socket(plain, server_hostname=settings.server_name) as secure,
        ):
            found = secure.getpeercert(binary_form=True)
    except ssl.SSLEOFError as error:
        raise TransportError(f"{settings.address} hung up in the TLS handshake") from error
    except ssl.SSLError as error:
        raise PermissionRefused(
            f"{settings.address}: the server does not answer with TLS 1.3 ({error.reason}); check "
            "the port"
        ) from error
    except (OSError, UnicodeError) as error:
        # A front names its replicas: a name that none can have is no answer either.
        reason = getattr(error, "strerror", None) or error
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
