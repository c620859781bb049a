"""ring64: the wire form of masked integers, for secure aggregation alone; the spec is docs/wire.md.

It is no codec of a connection: `codec.get_codec` and `codec.decode` refuse it, so that no token id
can leave as an integer, and no integer arrives where an activation or a gradient is meant.
"""

from math import prod

import torch
from torch import Tensor

from cutlayer.errors import ProtocolError
from cutlayer.wire.codec import RING64, checked_buffers, decode
from cutlayer.wire.packed import Packed, bytes_of, tensor_of

__all__ = ["bytes_of_words", "decode_any", "pack_ring", "unpack_ring", "words_of"]


def pack_ring(elements: Tensor) -> Packed:
    """Eight bytes a value, as they are; on the CPU tensor and buffer share memory.

    Args:
        elements: int64 of any shape: integers modulo 2^64.

    Raises:
        ProtocolError: another type.
    """
    if elements.dtype != torch.int64:
        raise ProtocolError(
            f"cannot encode a {elements.dtype} tensor as {RING64}: it carries masked int64 values"
        )
    shape = tuple(elements.shape)
    return Packed(codec=RING64, dtype="int64", shape=shape, buffers=(bytes_of(elements),))


def unpack_ring(packed: Packed) -> Tensor:
    """The int64 values; memory is shared with a writable buffer.

    Raises:
        ProtocolError: another codec or type, or buffers that do not fit the shape.
    """
    if packed.codec != RING64 or packed.dtype != "int64":
        raise ProtocolError(
            f"tensor in codec {packed.codec[:40]!r} of {packed.dtype[:40]!r} where masked integers "
            f"({RING64}, int64) are meant"
        )
    (buffer,) = checked_buffers(packed, _layout)
    return tensor_of(buffer, torch.int64).reshape(packed.shape)


def words_of(data: bytes) -> Tensor:
    """Bytes of any length as int64, so that they travel as a tensor and not in a header."""
    whole = len(data).to_bytes(8, "little") + data
    padded = bytearray(whole + bytes(-len(whole) % 8))
    return torch.frombuffer(padded, dtype=torch.int64)


def bytes_of_words(words: Tensor) -> bytes:
    """What `words_of` was given.

    Raises:
        ProtocolError: the tensor was not made by it.
    """
    if (
        words.dtype != torch.int64
        or words.ndim != 1
        or not int(words[0] if len(words) else -1) >= 0
    ):
        raise ProtocolError("a tensor that holds no bytes where sealed bytes are wanted")
    data, length = words.contiguous().numpy().tobytes()[8:], int(words[0])
    if not len(data) - 8 < length <= len(data):
        raise ProtocolError(f"{len(data)} sealed bytes where {length} are announced")
    return data[:length]


def decode_any(packed: Packed) -> Tensor:
    """Unpack in either form, for messages whose tensors may be masked or plain.

    Raises:
        ProtocolError: as `unpack_ring` and `codec.decode`.
    """
    return unpack_ring(packed) if packed.codec == RING64 else decode(packed)


def _layout(shape: tuple[int, ...], dtype: str) -> tuple[int, ...]:
    return (8 * prod(shape),)
