"""Frames between a masked part and its workers: 32 bytes of header, a name, a body. No pickle.

It does not know what a body means (`worker`, `remote`). Little-endian:
magic "CLM1" | kind u8 | flags u8 (1: transposed) | name length u16 | number u64 | rows u32 |
columns u32 | body length u64 | name | body. A frame may be sealed: AES-256-GCM over name and body,
with the header as associated data, one key per direction and the frame's count as nonce.
"""

import socket
import struct
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from enum import IntEnum

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from cutlayer.errors import ProtocolError, TransportError

__all__ = ["MAX_BODY_BYTES", "Frame", "FrameKind", "FrameSocket"]

MAX_BODY_BYTES = 1 << 28
"""Of one frame; more is refused before memory is taken, less is taken as it comes."""

_HEADER = struct.Struct("<4sBBHQIIQ")
_MAGIC = b"CLM1"
_MAX_NAME_BYTES = 256
_TAG_BYTES = 16
_SMALL_BYTES = 1 << 16
_FIRST_BYTES = 1 << 20


class FrameKind(IntEnum):
    """What a frame says."""

    HELLO = 1
    HOLD = 2
    ROWS = 3
    MULTIPLY = 4
    PRODUCT = 5
    DEAL = 6
    DEALT = 7
    DONE = 8
    FAILED = 9


@dataclass(frozen=True, kw_only=True)
class Frame:
    """One message."""

    kind: FrameKind
    number: int = 0
    """Of the question; its answer has the same."""
    name: str = ""
    """Key of a layer."""
    transpose: bool = False
    rows: int = 0
    columns: int = 0
    body: bytes | bytearray | memoryview = field(default=b"", repr=False)


class FrameSocket:
    """Sends and receives frames; used from one thread at a time."""

    def __init__(self, connection: socket.socket, peer: str, timeout_s: float | None) -> None:
        """
        Args:
            connection: a connected stream socket, which is closed with this.
            peer: for error messages.
            timeout_s: silence, in the middle of a frame or before one, that ends it.
        """
        self._socket = connection
        self._socket.settimeout(timeout_s)
        if connection.family in (socket.AF_INET, socket.AF_INET6):
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._peer = peer
        self._send_key: AESGCM | None = None
        self._receive_key: AESGCM | None = None
        self._num_sent = self._num_received = 0

    def seal(self, send_key: bytes, receive_key: bytes) -> None:
        """From now on every frame is sealed, both ways."""
        self._send_key, self._receive_key = AESGCM(send_key), AESGCM(receive_key)
        self._num_sent = self._num_received = 0

    def send(self, frame: Frame) -> None:
        """Send one frame.

        Raises:
            TransportError: the peer is gone or takes nothing.
        """
        name = frame.name.encode()
        header = _HEADER.pack(
            _MAGIC,
            frame.kind,
            int(frame.transpose),
            len(name),
            frame.number,
            frame.rows,
            frame.columns,
            len(memoryview(frame.body).cast("B")),
        )
        parts = [header, name, frame.body]
        if self._send_key is not None:
            nonce = self._num_sent.to_bytes(12, "little")
            plain = name + bytes(frame.body)
            parts = [header, self._send_key.encrypt(nonce, plain, header)]
        self._num_sent += 1
        try:
            self._send_all(parts)
        except OSError as error:
            raise self._lost(error) from error

    def _send_all(self, parts: Sequence[bytes | bytearray | memoryview]) -> None:
        """Together where they fit: a small header by itself may wait for an acknowledgement."""
        first = b"".join(part for part in parts[:-1])
        if len(memoryview(parts[-1]).cast("B")) <= _SMALL_BYTES:
            self._socket.sendall(first + bytes(parts[-1]))
            return
        self._socket.sendall(first)
        self._socket.sendall(parts[-1])

    def receive(self) -> Frame | None:
        """The next frame; None where the peer closed between two of them.

        Raises:
            ProtocolError: it is malformed, too large or not sealed by the peer.
            TransportError: the peer is gone or silent.
        """
        head = self._read(_HEADER.size, may_end=True)
        if head is None:
            return None
        magic, kind, flags, name_bytes, number, rows, columns, body_bytes = _HEADER.unpack(head)
        if magic != _MAGIC or kind not in set(FrameKind) or flags > 1:
            raise ProtocolError(f"{self._peer} sent no frame of this format; is it a worker?")
        if name_bytes > _MAX_NAME_BYTES or body_bytes > MAX_BODY_BYTES:
            raise ProtocolError(
                f"{self._peer} announced {body_bytes} bytes, the most are {MAX_BODY_BYTES}"
            )
        content = self._content(bytes(head), name_bytes + body_bytes)
        try:
            name = bytes(content[:name_bytes]).decode("ascii")
        except UnicodeDecodeError as error:
            raise ProtocolError(f"{self._peer} sent a name that is no text") from error
        return Frame(
            kind=FrameKind(kind),
            number=number,
            name=name,
            transpose=bool(flags),
            rows=rows,
            columns=columns,
            body=content[name_bytes:],
        )

    def close(self) -> None:
        """End the connection for both sides; a thread that waits on it wakes up."""
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()

    def drop(self) -> None:
        """Forget the connection, which another process goes on with."""
        self._socket.close()

    def _content(self, head: bytes, num_bytes: int) -> memoryview:
        if self._receive_key is None:
            content = self._read(num_bytes)
            assert content is not None
            return memoryview(content)
        sealed = self._read(num_bytes + _TAG_BYTES)
        assert sealed is not None
        nonce = self._num_received.to_bytes(12, "little")
        self._num_received += 1
        try:
            return memoryview(self._receive_key.decrypt(nonce, bytes(sealed), head))
        except InvalidTag as error:
            raise ProtocolError(
                f"{self._peer} does not hold the key that the settings name, or somebody changed "
                "a frame on its way; nothing was used"
            ) from error

    def _read(self, num_bytes: int, may_end: bool = False) -> bytearray | None:
        data, filled = bytearray(min(num_bytes, _FIRST_BYTES)), 0
        while filled < num_bytes:
            if filled == len(data):
                # Three times what has come: few copies, and no memory for an announcement.
                data += bytes(min(num_bytes - filled, 3 * filled))
            try:
                with memoryview(data)[filled:] as rest:
                    got = self._socket.recv_into(rest)
            except OSError as error:
                raise self._lost(error) from error
            if not got:
                if may_end and not filled:
                    return None
                raise TransportError(f"{self._peer} closed the connection within a frame")
            filled += got
        return data

    def _lost(self, error: OSError) -> TransportError:
        reason = "is silent" if isinstance(error, TimeoutError) else f"is gone ({error.strerror})"
        return TransportError(f"{self._peer} {reason}; look at its own log")
