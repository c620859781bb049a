"""A tensor in wire form, and the way between tensors and flat memory without copies.

It does not code values (`codec`) nor frame them (`frame`).
"""

from dataclasses import dataclass
from math import isfinite

import torch
from torch import Tensor

from cutlayer.errors import ProtocolError

__all__ = [
    "FLOAT_DTYPES",
    "MAX_RANK",
    "MAX_VALUES",
    "Buffer",
    "Device",
    "Packed",
    "bytes_of",
    "checked_finite",
    "floating_name",
    "not_finite",
    "peak_of",
    "tensor_of",
]

Buffer = bytes | bytearray | memoryview
Device = torch.device | str

MAX_RANK = 8
"""Dimensions that a tensor on the wire may have."""
MAX_VALUES = 1 << 40
"""Values that it may have; frames are far smaller, this keeps hostile shapes out of torch."""

FLOAT_DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64)
}
"""Types that may travel, by name; integers have no form here, so token ids cannot leave."""


@dataclass(frozen=True, kw_only=True)
class Packed:
    """One tensor in wire form."""

    codec: str
    """Registered name of the codec that made the buffers."""
    dtype: str
    """Type of the decoded tensor, such as "float32"."""
    shape: tuple[int, ...]
    buffers: tuple[Buffer, ...]
    """Flat bytes, little-endian; how many and how long is the codec's `layout`."""

    @property
    def num_bytes(self) -> int:
        """Bytes of all buffers."""
        return sum(len(buffer) for buffer in self.buffers)


def floating_name(x: Tensor) -> str:
    """The dtype's name, or an error if such a tensor may not travel."""
    name = str(x.dtype).removeprefix("torch.")
    if name not in FLOAT_DTYPES:
        known = ", ".join(sorted(FLOAT_DTYPES))
        raise ProtocolError(f"cannot encode a {name} tensor; only {known} may leave")
    return name


def peak_of(x: Tensor) -> float:
    """Largest magnitude, or an error if a value is NaN or infinite."""
    if x.numel() == 0:
        return 0.0
    low, high = _ends(x)
    if not (isfinite(low) and isfinite(high)):
        raise not_finite("encode", tuple(x.shape))
    return max(-low, high)


def checked_finite(x: Tensor, packed: Packed) -> Tensor:
    """`x` as it is, or an error if a value that came out of `packed` is NaN or infinite."""
    if x.numel() and not all(map(isfinite, _ends(x))):
        raise not_finite(f"decode {packed.codec}", packed.shape)
    return x


def _ends(x: Tensor) -> tuple[float, float]:
    """Smallest and largest value; NaN where one is NaN."""
    # Ten times faster than isfinite().all(); as numbers, a token pays no further tensor calls.
    low, high = torch.aminmax(x)
    return float(low), float(high)


def not_finite(action: str, shape: tuple[int, ...]) -> ProtocolError:
    """The error for a tensor that must not travel; it names the shape, never a value."""
    return ProtocolError(
        f"cannot {action}: a tensor of shape {list(shape)} holds NaN or infinite values; "
        "lower the learning rate or clip before it leaves"
    )


def bytes_of(x: Tensor) -> memoryview:
    """The tensor's memory, without a copy if it is contiguous on the CPU.

    Trap: writing to the tensor before the buffer is sent changes what is sent.
    """
    x = x.detach().cpu().contiguous()
    if x.numel() == 0:
        return memoryview(b"")
    return x.reshape(-1).view(torch.uint8).numpy().data


def tensor_of(buffer: Buffer, dtype: torch.dtype) -> Tensor:
    """A flat tensor over the buffer's memory; read-only memory is copied, torch cannot mark it."""
    if len(buffer) == 0:
        return torch.empty(0, dtype=dtype)
    is_readonly = memoryview(buffer).readonly
    return torch.frombuffer(bytearray(buffer) if is_readonly else buffer, dtype=dtype)
