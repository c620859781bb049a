"""Codecs: a tensor to wire buffers and back, one registered class each; the spec is docs/wire.md.

It does not frame, send or noise, and knows no tensor's meaning. Only floating-point tensors can be
packed: there is no form for token ids, labels or masks. Masked integers have one of their own
(`ring`), which nothing here makes or takes.

Shapes: R = rows (all dimensions but the last, flattened), W = width of the last dimension,
G = groups per row, S = values per group (the last group of a row may be padded in memory).
"""

from collections.abc import Callable
from math import prod
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import pad

from cutlayer.errors import ConfigError, ProtocolError
from cutlayer.registry import Registry
from cutlayer.wire.packed import (
    FLOAT_DTYPES,
    MAX_RANK,
    MAX_VALUES,
    Buffer,
    Device,
    Packed,
    bytes_of,
    checked_finite,
    floating_name,
    not_finite,
    peak_of,
    tensor_of,
)

__all__ = [
    "CODECS",
    "RING64",
    "Buffer",
    "Codec",
    "Packed",
    "checked_buffers",
    "decode",
    "encode",
    "get_codec",
]


RING64 = "ring64"
"""Name of the wire form of masked integers (`ring`)."""

_BF16_MAX = torch.finfo(torch.bfloat16).max
_SMALLEST_SCALE = torch.finfo(torch.bfloat16).tiny


class Codec(Protocol):
    """A wire form of floating-point tensors. Each row is coded alone: batching changes nothing."""

    def encode(self, x: Tensor) -> Packed:
        """Pack a tensor of any shape and device.

        Raises:
            ProtocolError: a value is NaN or infinite, or the dtype is not floating point.
        """

    def decode(self, packed: Packed, device: Device = "cpu") -> Tensor:
        """Unpack; float32 except for raw, which keeps its dtype.

        Raises:
            ProtocolError: buffers do not fit the shape, or a value is NaN or infinite.
        """

    def layout(self, shape: tuple[int, ...], dtype: str) -> tuple[int, ...]:
        """Bytes of each buffer of a tensor."""


CODECS: Registry[Codec] = Registry("codec")


def get_codec(name: str) -> Codec:
    """The codec called `name`, for settings.

    Raises:
        ConfigError: no codec has that name; lists the known ones.
    """
    if name == RING64:
        known = ", ".join(CODECS)
        raise ConfigError(
            f"{RING64} carries the masked integers of secure aggregation (`wire.ring`) and no "
            f"activation or gradient; choose one of {known}"
        )
    return CODECS.get(name)


def encode(x: Tensor, codec: str = "raw") -> Packed:
    """Pack `x` with the codec of that name; raises as `get_codec` and `Codec.encode` do."""
    return get_codec(codec).encode(x)


def decode(packed: Packed, device: Device = "cpu") -> Tensor:
    """Unpack with the codec that the packed tensor names.

    Raises:
        ProtocolError: unknown codec, wrong buffers, or a value that is NaN or infinite.
    """
    if packed.codec == RING64:
        raise ProtocolError(f"{RING64} tensor where floating-point values are meant")
    if packed.codec not in CODECS:
        known = ", ".join(CODECS)
        raise ProtocolError(f"tensor in unknown codec {packed.codec[:40]!r}; known: {known}")
    return CODECS.get(packed.codec).decode(packed, device)


@CODECS.register("raw")
class RawCodec:
    """The values as they are; on the CPU tensor and buffer share memory in both directions."""

    def encode(self, x: Tensor) -> Packed:
        dtype = floating_name(x)
        peak_of(x.detach())
        return Packed(codec="raw", dtype=dtype, shape=tuple(x.shape), buffers=(bytes_of(x),))

    def decode(self, packed: Packed, device: Device = "cpu") -> Tensor:
        (buffer,) = _checked(self, packed)
        x = tensor_of(buffer, FLOAT_DTYPES[packed.dtype]).reshape(packed.shape).to(device)
        return checked_finite(x, packed)

    def layout(self, shape: tuple[int, ...], dtype: str) -> tuple[int, ...]:
        if dtype not in FLOAT_DTYPES:
            known = ", ".join(sorted(FLOAT_DTYPES))
            raise ProtocolError(f"raw tensor of dtype {dtype[:40]!r}; allowed: {known}")
        return (prod(shape) * FLOAT_DTYPES[dtype].itemsize,)


@CODECS.register("bf16")
class Bf16Codec:
    """Two bytes a value, relative error at most 2^-9 per value."""

    def encode(self, x: Tensor) -> Packed:
        floating_name(x)
        x = x.detach()
        if peak_of(x) > _BF16_MAX:
            x = x.clamp(-_BF16_MAX, _BF16_MAX)
        buffer = bytes_of(x.to(torch.bfloat16))
        return Packed(codec="bf16", dtype="float32", shape=tuple(x.shape), buffers=(buffer,))

    def decode(self, packed: Packed, device: Device = "cpu") -> Tensor:
        (buffer,) = _checked(self, packed)
        x = tensor_of(buffer, torch.bfloat16).to(device).float()
        return checked_finite(x.reshape(packed.shape), packed)

    def layout(self, shape: tuple[int, ...], dtype: str) -> tuple[int, ...]:
        _only_float32("bf16", dtype)
        return (2 * prod(shape),)


class _ScaledCodec:
    """Values of one byte, and one bf16 scale per group of values of a row.

    value = byte value * scale; scale = largest magnitude of the group / peak, rounded to bf16.
    """

    name: str
    dtype: torch.dtype
    peak: float
    """Largest byte value used."""
    group: int | None
    """S, or None for the whole row."""

    def encode(self, x: Tensor) -> Packed:
        floating_name(x)
        x_RGS = self._grouped(x.detach().to(torch.float32))
        scale_RG = _scales(x_RGS, self.peak)
        values_RGS = x_RGS * scale_RG.float().reciprocal()[..., None]
        values_RGS.clamp_(-self.peak, self.peak)
        if self.dtype == torch.int8:
            values_RGS.round_()
        values_RW = values_RGS.to(self.dtype).flatten(1)[:, : _width(x.shape)]
        buffers = (bytes_of(values_RW), bytes_of(scale_RG))
        return Packed(codec=self.name, dtype="float32", shape=tuple(x.shape), buffers=buffers)

    def decode(self, packed: Packed, device: Device = "cpu") -> Tensor:
        values, scales = _checked(self, packed)
        width = _width(packed.shape)
        num_groups = self._num_groups(width)
        num_rows = len(values) // width if width else 0
        x_RW = self._values(values, device).reshape(num_rows, width)
        scale_RG = tensor_of(scales, torch.bfloat16).to(device).float()
        scale_RG = scale_RG.reshape(num_rows, num_groups, 1)
        x_RGS = self._grouped(x_RW)
        x_RW = (x_RGS * scale_RG).flatten(1)[:, :width]
        return checked_finite(x_RW.reshape(packed.shape), packed)

    def layout(self, shape: tuple[int, ...], dtype: str) -> tuple[int, ...]:
        _only_float32(self.name, dtype)
        num_values, width = prod(shape), _width(shape)
        num_rows = num_values // width if width else 0
        return num_values, 2 * num_rows * self._num_groups(width)

    def _values(self, buffer: Buffer, device: Device) -> Tensor:
        return tensor_of(buffer, self.dtype).to(device).float()

    def _num_groups(self, width: int) -> int:
        return 1 if self.group is None else -(-width // self.group)

    def _grouped(self, x: Tensor) -> Tensor:
        """Rows cut into groups, the last one padded with zeros."""
        width = _width(x.shape)
        x_RW = x.reshape(x.numel() // width if width else 0, width)
        size, num_groups = self.group or width, self._num_groups(width)
        if size * num_groups != width:
            x_RW = pad(x_RW, (0, size * num_groups - width))
        return x_RW.reshape(x_RW.shape[0], num_groups, size)


@CODECS.register("fp8")
class Fp8Codec(_ScaledCodec):
    """e4m3 with a scale per row: error at most 1/16 per value, down to 2^-15 of the row's peak."""

    name = "fp8"
    dtype = torch.float8_e4m3fn
    peak = 448.0
    group = None

    def _values(self, buffer: Buffer, device: Device) -> Tensor:
        # Torch's own conversion back from fp8 is five times slower on a CPU than a table.
        index = tensor_of(buffer, torch.uint8).to(device).int()
        every_byte = torch.arange(256, dtype=torch.uint8).view(self.dtype).float()
        return every_byte.to(device).index_select(0, index)


@CODECS.register("int8")
class Int8Codec(_ScaledCodec):
    """Integers with a scale per 32 values of a row: error at most 1/127 of the group's peak."""

    name = "int8"
    dtype = torch.int8
    peak = 127.0
    group = 32


def _scales(x_RGS: Tensor, peak: float) -> Tensor:
    """One bf16 scale per group; never zero, and never so large that scale * peak overflows."""
    largest_RG = x_RGS.abs().amax(-1) if x_RGS.shape[-1] else x_RGS.new_zeros(x_RGS.shape[:2])
    if largest_RG.numel() and not torch.isfinite(largest_RG.max()):
        raise not_finite("encode", tuple(x_RGS.shape))
    scale_RG = (largest_RG / peak).clamp_min_(_SMALLEST_SCALE).to(torch.bfloat16)
    return torch.where(scale_RG.float() * peak > _BF16_MAX, _largest_scale(peak), scale_RG)


def _largest_scale(peak: float) -> Tensor:
    scale = torch.tensor(_BF16_MAX / peak, dtype=torch.bfloat16)
    return scale * (1 - 2**-7)


def _width(shape: tuple[int, ...]) -> int:
    return shape[-1] if shape else 1


def _only_float32(codec: str, dtype: str) -> None:
    if dtype != "float32":
        raise ProtocolError(f"{codec} tensor of dtype {dtype[:40]!r}; it decodes to float32 only")


def _checked(codec: Codec, packed: Packed) -> tuple[Buffer, ...]:
    return checked_buffers(packed, codec.layout)


def checked_buffers(
    packed: Packed, layout: Callable[[tuple[int, ...], str], tuple[int, ...]]
) -> tuple[Buffer, ...]:
    """The buffers, once their sizes are what shape and dtype ask for.

    Args:
        packed: from a peer.
        layout: bytes of each buffer, by shape and dtype.

    Raises:
        ProtocolError: they are not, or the shape is impossible.
    """
    shape = packed.shape
    if len(shape) > MAX_RANK or any(size < 0 for size in shape):
        raise ProtocolError(f"tensor of shape {list(shape)[:16]}; allowed: {MAX_RANK} sizes >= 0")
    if prod(max(size, 1) for size in shape) > MAX_VALUES:
        raise ProtocolError(f"tensor of shape {list(shape)} is larger than {MAX_VALUES} values")
    wanted = layout(shape, packed.dtype)
    found = tuple(len(buffer) for buffer in packed.buffers)
    if wanted != found:
        raise ProtocolError(
            f"{packed.codec} tensor of shape {list(shape)} needs buffers of {list(wanted)} bytes, "
            f"got {list(found)[:8]}"
        )
    return packed.buffers
