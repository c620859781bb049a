"""Messages of the naive baseline: a fixed header, raw tensor bytes, one blocking socket.

It does not encrypt, chunk, compress or overlap anything, and it copies every tensor on both sides:
that is what the baseline is. It is no part of the product's wire format.
"""

import socket
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from types import TracebackType

import torch
from torch import Tensor

__all__ = ["NaiveKind", "NaiveMessage", "NaiveSocket", "listen"]

_MESSAGE = struct.Struct("<4sBBHdQ")
"""Magic, kind, number of tensors, reserved, one scalar, bytes that follow."""
_TENSOR = struct.Struct("<BB6x4q")
"""Dtype code, number of dimensions, four dimensions."""
_MAGIC = b"NAIV"
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.float64)
_MAX_PAYLOAD_BYTES = 1 << 33


class NaiveKind(IntEnum):
    """What a message is for."""

    JOB = 1
    """Client to server: int64 (mode, mask form, steps, torch threads); scalar: learning rate."""
    ASK = 2
    HIDDEN = 3
    """h [b, s, H], mask, positions int64 [b, s]."""
    GRADIENT = 4
    DONE = 5
    END = 6
    """Server to client, after the last step: float64 seconds of each."""


@dataclass(frozen=True, kw_only=True)
class NaiveMessage:
    """One received message."""

    kind: NaiveKind
    tensors: tuple[Tensor, ...]
    value: float


class NaiveSocket:
    """A connected TCP socket that speaks whole messages and counts their bytes."""

    def __init__(self, connection: socket.socket) -> None:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._connection = connection
        self.bytes_sent = 0
        self.bytes_received = 0

    def send(self, kind: NaiveKind, *tensors: Tensor, value: float = 0.0) -> None:
        """Copy the tensors into one buffer and write it."""
        payload = b"".join(part for tensor in tensors for part in _pack_tensor(tensor))
        header = _MESSAGE.pack(_MAGIC, kind, len(tensors), 0, value, len(payload))
        self._connection.sendall(header + payload)
        self.bytes_sent += len(header) + len(payload)

    def receive(self, *expected: NaiveKind) -> NaiveMessage:
        """Block until one message is here.

        Raises:
            ConnectionError: the peer closed, or sent something else than expected.
        """
        magic, kind, num_tensors, _, value, num_bytes = _MESSAGE.unpack(self._read(_MESSAGE.size))
        if magic != _MAGIC or kind not in expected or num_bytes > _MAX_PAYLOAD_BYTES:
            raise ConnectionError(f"expected {expected}, got kind {kind}, {num_bytes} bytes")
        payload = self._read(num_bytes)
        return NaiveMessage(
            kind=NaiveKind(kind), tensors=_unpack_tensors(payload, num_tensors), value=value
        )

    def close(self) -> None:
        """Close the connection."""
        self._connection.close()

    def __enter__(self) -> "NaiveSocket":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _read(self, num_bytes: int) -> bytearray:
        buffer = bytearray(num_bytes)
        view, done = memoryview(buffer), 0
        while done < num_bytes:
            count = self._connection.recv_into(view[done:])
            if count == 0:
                raise ConnectionError("the peer closed the connection")
            done += count
        self.bytes_received += num_bytes
        return buffer


def listen(port: int = 0) -> socket.socket:
    """A listening socket on 127.0.0.1."""
    return socket.create_server(("127.0.0.1", port))


def _pack_tensor(tensor: Tensor) -> Sequence[bytes]:
    shape = (*tensor.shape, *([1] * (4 - tensor.ndim)))
    flat = tensor.detach().contiguous().view(torch.uint8) if tensor.numel() else tensor
    return (
        _TENSOR.pack(_DTYPES.index(tensor.dtype), tensor.ndim, *shape),
        flat.numpy().tobytes(),
    )


def _unpack_tensors(payload: bytearray, num_tensors: int) -> tuple[Tensor, ...]:
    tensors, offset = [], 0
    for _ in range(num_tensors):
        code, num_dims, *dims = _TENSOR.unpack_from(payload, offset)
        offset += _TENSOR.size
        shape, dtype = dims[:num_dims], _DTYPES[code]
        count = int(torch.Size(shape).numel())
        view = torch.frombuffer(payload, dtype=dtype, count=count, offset=offset)
        tensors.append(view.reshape(shape).clone())
        offset += count * dtype.itemsize
    return tuple(tensors)
