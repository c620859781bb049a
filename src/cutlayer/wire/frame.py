"""Frames: prelude, msgpack header, raw tensor buffers; the spec is docs/wire.md.

It does not know what a message means, how tensors are coded (`codec`) or how bytes travel
(`channel`). Everything that it reads comes from a hostile peer: each length is checked against
`FrameLimits` before anything is allocated, and every refusal is a `ProtocolError`.
"""

import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod
from typing import Annotated, NamedTuple

import msgspec
from msgspec import Meta

from cutlayer.errors import ProtocolError
from cutlayer.wire.messages import HEADERS, Header, Kind
from cutlayer.wire.packed import MAX_RANK, Buffer, Packed

__all__ = [
    "OLDEST_PROTOCOL_VERSION",
    "PRELUDE_BYTES",
    "PROTOCOL_VERSION",
    "Frame",
    "FrameLimits",
    "Prelude",
    "decode",
    "encode",
    "frame_bytes",
    "is_like_call",
    "read_prelude",
]

PROTOCOL_VERSION = 2
"""What this software speaks by itself."""
OLDEST_PROTOCOL_VERSION = 2
"""What it still understands; docs/wire.md says how a version is retired."""

MAGIC = b"CL"
_PRELUDE = struct.Struct("<2sBBIII")
PRELUDE_BYTES = _PRELUDE.size
"""16: magic, version, kind, call id, header bytes, body bytes."""
_LIKE_CALL = 0x80
"""Bit of the kind's byte: the one tensor is laid out as that of the call."""
_LIKE_NAMES = {Kind.FORWARD_DONE: "y", Kind.BACKWARD_DONE: "grad", Kind.DECODED: "y"}
"""Replies that may be like their call, and how their tensor is called."""
_KINDS = {int(kind): kind for kind in HEADERS}
_NO_FIELDS = b"\x90"
_MAX_BODY_BYTES = (1 << 32) - 1
_ALIGNMENT = 8


@dataclass(frozen=True, kw_only=True)
class FrameLimits:
    """What a receiver accepts; a frame beyond any of these is refused before it is allocated."""

    max_frame_bytes: int = 256 << 20
    """Prelude, header and body together."""
    max_header_bytes: int = 1 << 20
    max_tensors: int = 8192
    max_rank: int = MAX_RANK
    max_name_bytes: int = 256
    """Length of a tensor's name."""


@dataclass(frozen=True)
class Frame:
    """One message: a typed header and named tensors in wire form."""

    kind: Kind
    header: Header
    tensors: Mapping[str, Packed] = field(default_factory=dict)
    call_id: int = 0
    """Matches a reply to its call; the channel sets it."""
    version: int = PROTOCOL_VERSION
    """Protocol version that the frame is written in; a reply repeats the call's."""
    is_like_call: bool = False
    """Write it without its tensor table, which is the call's; see `is_like_call`."""


class Prelude(NamedTuple):
    """The first `PRELUDE_BYTES` of a frame, checked."""

    version: int
    kind: Kind
    is_like_call: bool
    call_id: int
    header_bytes: int
    body_bytes: int

    @property
    def total_bytes(self) -> int:
        """The whole frame."""
        return _aligned(PRELUDE_BYTES + self.header_bytes) + self.body_bytes


class _Entry(
    msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, array_like=True
):
    """One line of the tensor table."""

    name: str
    codec: str
    dtype: str
    shape: tuple[Annotated[int, Meta(ge=0, lt=1 << 48)], ...]
    lengths: tuple[Annotated[int, Meta(ge=0, lt=1 << 48)], ...]
    """Bytes of each buffer."""


_ENCODER = msgspec.msgpack.Encoder()
_DECODERS = {
    kind: msgspec.msgpack.Decoder(tuple[header, list[_Entry]])  # type: ignore[valid-type]
    for kind, header in HEADERS.items()
}
_LIKE_DECODERS = {kind: msgspec.msgpack.Decoder(HEADERS[kind]) for kind in _LIKE_NAMES}


def is_like_call(reply: Frame, call: Frame) -> bool:
    """Whether the reply's tensor table says nothing that the call's did not say."""
    name = _LIKE_NAMES.get(reply.kind)
    if name is None or len(call.tensors) != 1 or list(reply.tensors) != [name]:
        return False
    (sent,) = call.tensors.values()
    return _layout(reply.tensors[name]) == _layout(sent)


def encode(frame: Frame) -> list[Buffer]:
    """The frame as buffers to send in order. Tensors are not copied.

    Raises:
        ProtocolError: the tensors are larger than a frame can say.
    """
    assert type(frame.header) is HEADERS[frame.kind], f"{frame.kind.name} with {frame.header!r}"
    header = _written_header(frame)
    buffers = [buffer for packed in frame.tensors.values() for buffer in packed.buffers]
    body_bytes = sum(_aligned(len(buffer)) for buffer in buffers)
    if body_bytes > _MAX_BODY_BYTES:
        raise ProtocolError(f"{frame.kind.name} frame of {body_bytes} bytes: send fewer rows")
    kind = frame.kind | (_LIKE_CALL if frame.is_like_call else 0)
    prelude = _PRELUDE.pack(MAGIC, frame.version, kind, frame.call_id, len(header), body_bytes)
    parts: list[Buffer] = [prelude + header + _padding(PRELUDE_BYTES + len(header))]
    for buffer in buffers:
        parts += [buffer, _padding(len(buffer))]
    return [part for part in parts if len(part)]


def frame_bytes(frame: Frame) -> int:
    """Size of the encoded frame."""
    return sum(len(buffer) for buffer in encode(frame))


def read_prelude(data: Buffer, limits: FrameLimits) -> Prelude:
    """Check the first `PRELUDE_BYTES` of a frame.

    Raises:
        ProtocolError: not a frame, an unknown version, kind or flag, or larger than the limits.
    """
    if len(data) < PRELUDE_BYTES:
        raise ProtocolError(f"frame is truncated: {len(data)} of {PRELUDE_BYTES} prelude bytes")
    magic, version, kind_byte, call_id, header_bytes, body_bytes = _PRELUDE.unpack_from(data)
    if magic != MAGIC:
        raise ProtocolError(f"frame starts with {magic!r}, not {MAGIC!r}: the peer is no cutlayer")
    if not OLDEST_PROTOCOL_VERSION <= version <= PROTOCOL_VERSION:
        raise ProtocolError(
            f"frame of protocol version {version}; this side speaks {OLDEST_PROTOCOL_VERSION} to "
            f"{PROTOCOL_VERSION}: upgrade the older side"
        )
    kind = _KINDS.get(kind_byte & ~_LIKE_CALL)
    if kind is None:
        raise ProtocolError(f"frame of unknown kind {kind_byte & ~_LIKE_CALL}")
    is_like = bool(kind_byte & _LIKE_CALL)
    if is_like and kind not in _LIKE_NAMES:
        raise ProtocolError(f"{kind.name} frame that claims to be like its call")
    prelude = Prelude(version, kind, is_like, call_id, header_bytes, body_bytes)
    _check_sizes(prelude, limits)
    return prelude


def decode(data: Buffer, limits: FrameLimits | None = None, call: Frame | None = None) -> Frame:
    """Read one whole frame; its tensors' buffers are views of `data`, nothing is copied.

    Args:
        data: a frame from its first byte to its last.
        limits: what is accepted.
        call: what the frame answers, if that is known: the reply may be laid out like it.

    Raises:
        ProtocolError: the bytes are not exactly one frame within the limits.
    """
    limits = limits or FrameLimits()
    prelude = read_prelude(data, limits)
    view = memoryview(data).cast("B")
    if len(view) < prelude.total_bytes:
        raise ProtocolError(f"frame is truncated: {len(view)} of {prelude.total_bytes} bytes")
    if len(view) > prelude.total_bytes:
        raise ProtocolError(f"{len(view) - prelude.total_bytes} bytes follow the frame's end")
    end = PRELUDE_BYTES + prelude.header_bytes
    written = view[PRELUDE_BYTES:end]
    if prelude.is_like_call:
        header, entries = _read_like(prelude, written, call)
    else:
        header, entries = _read_header(prelude, written)
        _check_table(entries, limits)
    _check_padding(view[end : _aligned(end)])
    tensors = _read_tensors(entries, view[_aligned(end) :])
    return Frame(prelude.kind, header, tensors, prelude.call_id, prelude.version)


def _written_header(frame: Frame) -> bytes:
    if not frame.is_like_call:
        header = frame.header.written()
        return _ENCODER.encode((header, [_entry(*item) for item in frame.tensors.items()]))
    assert frame.kind in _LIKE_NAMES
    like = _ENCODER.encode(frame.header)
    return b"" if like == _NO_FIELDS else like


def _read_like(
    prelude: Prelude, data: memoryview, call: Frame | None
) -> tuple[Header, list[_Entry]]:
    """Header and tensor table of a frame that leaves out what its call said."""
    name = prelude.kind.name
    if call is None or len(call.tensors) != 1:
        raise ProtocolError(f"{name} frame that is like a call without a tensor")
    try:
        header = _LIKE_DECODERS[prelude.kind].decode(data if len(data) else _NO_FIELDS)
    except (ValueError, RecursionError) as error:
        raise ProtocolError(f"{name} header is malformed: {error}") from error
    (sent,) = call.tensors.values()
    return header, [_entry(_LIKE_NAMES[prelude.kind], sent)]


def _check_sizes(prelude: Prelude, limits: FrameLimits) -> None:
    if prelude.header_bytes > limits.max_header_bytes:
        raise ProtocolError(
            f"frame header of {prelude.header_bytes} bytes; the limit is {limits.max_header_bytes}"
        )
    if prelude.total_bytes > limits.max_frame_bytes:
        raise ProtocolError(
            f"{prelude.kind.name} frame of {prelude.total_bytes} bytes; the limit is "
            f"{limits.max_frame_bytes}: send fewer or shorter rows at once, or raise the "
            "receiver's max_frame_bytes"
        )


def _read_header(prelude: Prelude, data: memoryview) -> tuple[Header, list[_Entry]]:
    try:
        header, entries = _DECODERS[prelude.kind].decode(data)
    # a UnicodeDecodeError is a ValueError, and so is every error of msgspec
    except (ValueError, RecursionError) as error:
        raise ProtocolError(f"{prelude.kind.name} header is malformed: {error}") from error
    return header, entries


def _check_table(entries: list[_Entry], limits: FrameLimits) -> None:
    if len(entries) > limits.max_tensors:
        raise ProtocolError(f"frame of {len(entries)} tensors; the limit is {limits.max_tensors}")
    names = {entry.name for entry in entries}
    if len(names) != len(entries):
        raise ProtocolError("two tensors of the frame have the same name")
    for entry in entries:
        if len(entry.name.encode()) > limits.max_name_bytes:
            raise ProtocolError(f"tensor name of more than {limits.max_name_bytes} bytes")
        if len(entry.shape) > limits.max_rank:
            raise ProtocolError(
                f"tensor {entry.name!r} has {len(entry.shape)} dimensions; the limit is "
                f"{limits.max_rank}"
            )
        if prod(max(size, 1) for size in entry.shape) > limits.max_frame_bytes:
            # every codec spends at least a byte per value
            raise ProtocolError(f"tensor {entry.name!r} of shape {list(entry.shape)} cannot fit")


def _read_tensors(entries: list[_Entry], body: memoryview) -> dict[str, Packed]:
    wanted = sum(_aligned(length) for entry in entries for length in entry.lengths)
    if wanted != len(body):
        raise ProtocolError(
            f"tensor table describes {wanted} body bytes, the frame has {len(body)}"
        )
    tensors, start = {}, 0
    for entry in entries:
        buffers = []
        for length in entry.lengths:
            end = start + length
            buffers.append(body[start:end])
            start = _aligned(end)
            _check_padding(body[end:start])
        tensors[entry.name] = Packed(
            codec=entry.codec, dtype=entry.dtype, shape=entry.shape, buffers=tuple(buffers)
        )
    return tensors


def _entry(name: str, packed: Packed) -> _Entry:
    return _Entry(
        name=name,
        codec=packed.codec,
        dtype=packed.dtype,
        shape=packed.shape,
        lengths=tuple(len(buffer) for buffer in packed.buffers),
    )


def _layout(packed: Packed) -> tuple[object, ...]:
    lengths = [len(buffer) for buffer in packed.buffers]
    return packed.codec, packed.dtype, packed.shape, lengths


def _check_padding(padding: memoryview) -> None:
    if any(padding):
        raise ProtocolError("padding bytes of the frame are not zero")


def _aligned(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT


def _padding(size: int) -> bytes:
    return bytes(_aligned(size) - size)
