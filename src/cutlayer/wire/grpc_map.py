"""The one place where gRPC's options, statuses and errors meet ours.

It does not open connections (`grpc_channel`) nor accept them (`grpc_listener`).
"""

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


def options(settings: ConnectionSettings | ListenSettings) -> list[tuple[str, int]]:
    """Channel arguments that both ends need."""
    return [
        ("grpc.max_receive_message_length", 2 * CHUNK_BYTES),
        ("grpc.max_send_message_length", 2 * CHUNK_BYTES),
        ("grpc.keepalive_time_ms", round(settings.keepalive_s * 1000)),
        ("grpc.keepalive_timeout_ms", round(settings.keepalive_timeout_s * 1000)),
        # the ping that keepalive sends has a timeout of its own, 60 s if it is not set
        ("grpc.http2.ping_timeout_ms", round(settings.keepalive_timeout_s * 1000)),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.max_pings_without_data", 0),
    ]


def from_grpc(call: grpc.Call, address: str) -> CutlayerError:
    """Our error for an RPC that has ended badly."""
    status, details = call.code(), _printable(call.details() or "")
    for key, value in call.trailing_metadata() or ():
        if key == _ERROR_KEY:
            return error_from_code(str(value)[:80], f"{address}: {details}")
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
