"""The one place where gRPC's options, statuses and errors meet ours.

It does not open connections (`grpc_channel`) nor accept them (`grpc_listener`).
"""

import re
from typing import NoReturn

import grpc

from cutlayer.errors import (
    CutlayerError,
    PermissionRefused,
    ProtocolError,
    TransportError,
    error_from_code,
)
from cutlayer.wire.endpoints import ConnectionSettings, ListenSettings
from cutlayer.wire.stream import CHUNK_BYTES

__all__ = ["METHOD", "OPENED", "SERVICE", "from_grpc", "options", "refuse"]

SERVICE = "cutlayer.Wire"
METHOD = "Frames"
OPENED = ("cutlayer-stream", "open")
"""Initial metadata with which a server says that it has accepted the peer."""

_ERROR_KEY = "cutlayer-error"
_WINDOW_BYTES = 4 << 20
"""First flow-control window of a stream: the default of 64 KB costs a round trip per 64 KB until
the window has grown."""
_MAX_DETAIL_CHARS = 2000

_BY_STATUS: dict[grpc.StatusCode, type[CutlayerError]] = {
    grpc.StatusCode.PERMISSION_DENIED: PermissionRefused,
    grpc.StatusCode.UNAUTHENTICATED: PermissionRefused,
    grpc.StatusCode.INVALID_ARGUMENT: ProtocolError,
    grpc.StatusCode.UNIMPLEMENTED: ProtocolError,
}
"""Every other status is a TransportError: the link or the server broke, another try may work."""

_STATUS: dict[type[CutlayerError], grpc.StatusCode] = {
    PermissionRefused: grpc.StatusCode.PERMISSION_DENIED,
    ProtocolError: grpc.StatusCode.INVALID_ARGUMENT,
    TransportError: grpc.StatusCode.UNAVAILABLE,
}

_TLS_FAILURE = re.compile(
    r"handshake failed|certificate|peer name .* is not in|tls ?alert|ssl_error", re.IGNORECASE
)


def options(settings: ConnectionSettings | ListenSettings) -> list[tuple[str, int]]:
    """Channel arguments that both ends need."""
    return [
        ("grpc.max_receive_message_length", 2 * CHUNK_BYTES),
        ("grpc.max_send_message_length", 2 * CHUNK_BYTES),
        ("grpc.http2.lookahead_bytes", _WINDOW_BYTES),
        ("grpc.keepalive_time_ms", round(settings.keepalive_s * 1000)),
        ("grpc.keepalive_timeout_ms", round(settings.keepalive_timeout_s * 1000)),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.max_pings_without_data", 0),
    ]


def from_grpc(call: grpc.Call, address: str) -> CutlayerError:
    """Our error for an RPC that has ended badly."""
    status, details = call.code(), _printable(call.details() or "")
    for key, value in call.trailing_metadata() or ():
        if key == _ERROR_KEY:
            return error_from_code(str(value)[:80], f"{address}: {details}")
    if status is grpc.StatusCode.UNAVAILABLE and _TLS_FAILURE.search(details):
        return PermissionRefused(
            f"{address}: the two sides do not accept each other's certificates ({details}); check "
            "the authority, the dates, the server's name and that both sides use tls"
        )
    if status is grpc.StatusCode.UNIMPLEMENTED:
        return ProtocolError(f"{address} is a gRPC server, but not one of cutlayer ({details})")
    error = _BY_STATUS.get(status, TransportError)
    return error(f"{address}: {details or 'the connection ended'} ({status.name.lower()})")


def refuse(context: grpc.ServicerContext, error: CutlayerError) -> NoReturn:
    """End the RPC so that the client raises the same error."""
    context.set_trailing_metadata(((_ERROR_KEY, type(error).__name__),))
    status = _STATUS.get(type(error), grpc.StatusCode.FAILED_PRECONDITION)
    context.abort(status, _printable(str(error)))
    raise AssertionError("abort returns to nobody")


def _printable(text: str) -> str:
    return "".join(c if c.isprintable() else " " for c in text)[:_MAX_DETAIL_CHARS]
