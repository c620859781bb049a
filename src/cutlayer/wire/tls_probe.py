"""Why TLS fails: a plain handshake that says what gRPC keeps to itself.

gRPC reports a refused client certificate as "Socket closed". It does not carry frames, and proves
nothing when it succeeds: the channel does its own handshake.
"""

import datetime as dt
import socket
import ssl
from pathlib import Path

from cryptography import x509

from cutlayer.errors import PermissionRefused
from cutlayer.wire.endpoints import ConnectionSettings
from cutlayer.wire.pinned import Pin

__all__ = ["tls_refusal"]


def tls_refusal(
    settings: ConnectionSettings, timeout_s: float, pin: Pin | None = None
) -> PermissionRefused | None:
    """Why one side does not accept the other, or None if TLS is not what fails."""
    try:
        hung_up = all(_hangs_up(settings, timeout_s, pin) for _ in range(2))
    except ssl.SSLCertVerificationError as error:
        return _refused_here(settings, error, pin)
    except ssl.SSLError as error:
        return _refused_in_handshake(settings, error)
    except OSError:
        return None
    return _refused_after_handshake(settings, "it hung up") if hung_up else None


def _refused_here(
    settings: ConnectionSettings, error: ssl.SSLCertVerificationError, pin: Pin | None
) -> PermissionRefused:
    if pin is not None:
        return PermissionRefused(
            f"{settings.address}: the server shows another certificate than the one whose "
            f"evidence was accepted ({error.verify_message})"
        )
    return PermissionRefused(
        f"{settings.address}: this side refuses the server's certificate: "
        f"{error.verify_message}; check tls.authority, the server's dates and its name "
        "(connection.server_name); a server that attests needs the section [tee] here"
    )


def _hangs_up(settings: ConnectionSettings, timeout_s: float, pin: Pin | None) -> bool:
    """Whether the server ends the connection between the handshake and its first byte.

    Under TLS 1.3 it judges the client's certificate only then, and gRPC sends no alert.
    """
    assert settings.tls is not None
    host, _, port = settings.address.rpartition(":")
    host = host.strip("[]")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_cert_chain(settings.tls.certificate, settings.tls.key)
    if pin is None:
        context.load_verify_locations(settings.tls.authority)
    else:
        context.load_verify_locations(cadata=pin.certificate.decode())
    context.set_alpn_protocols(["h2"])
    name = (settings.server_name or host) if pin is None else pin.name
    with (
        socket.create_connection((host, int(port)), timeout_s) as plain,
        context.wrap_socket(plain, server_hostname=name) as secure,
    ):
        try:
            return secure.recv(1) == b""
        except (ConnectionResetError, ssl.SSLEOFError):
            return True


def _refused_in_handshake(
    settings: ConnectionSettings, error: ssl.SSLError
) -> PermissionRefused | None:
    reason = error.reason or ""
    if "ALERT" in reason:
        return _refused_after_handshake(settings, reason.replace("_", " ").lower())
    if reason in {"WRONG_VERSION_NUMBER", "RECORD_LAYER_FAILURE"}:
        return PermissionRefused(
            f"{settings.address}: the server does not answer with TLS; check the port, and that "
            "both sides use tls"
        )
    return None


def _refused_after_handshake(settings: ConnectionSettings, said: str) -> PermissionRefused:
    assert settings.tls is not None
    path = settings.tls.certificate
    return PermissionRefused(
        f"{settings.address}: the server refuses this side's certificate {path} ({said}); "
        f"{_dates(path)}; check that the server trusts the authority that signed it"
    )


def _dates(path: Path) -> str:
    """Whether the certificate's own dates explain a refusal."""
    certificate = x509.load_pem_x509_certificate(path.read_bytes())
    start, end = certificate.not_valid_before_utc, certificate.not_valid_after_utc
    now = dt.datetime.now(dt.UTC)
    if now > end:
        return f"it expired on {end:%Y-%m-%d}, renew it with `cutlayer provision`"
    if now < start:
        return f"it is not valid before {start:%Y-%m-%d}, check the clock"
    return f"its dates are right (until {end:%Y-%m-%d})"
