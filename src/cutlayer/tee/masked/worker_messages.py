"""What the JSON bodies of worker frames say, and the bytes of tensors. It sends nothing."""

import hashlib
import math
from typing import Literal, TypeVar

import msgspec
import numpy as np
import torch
from torch import Tensor

from cutlayer.errors import ProtocolError
from cutlayer.tee.masked.framing import Frame
from cutlayer.tee.masked.quantise import FieldWeight

__all__ = [
    "VERSION",
    "Failed",
    "Hello",
    "Layout",
    "Role",
    "from_hex",
    "layer_key",
    "layout_of",
    "read",
    "tensor_bytes",
    "tensor_of",
    "told",
]

VERSION = 1
_MAX_SIDE = 1 << 20

T = TypeVar("T", bound=msgspec.Struct)
Role = Literal["accelerator", "dealer"]
"""Multiplies masked numbers, or pads; one process is never both."""


class Hello(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """First frame of each side."""

    version: int
    role: Role
    """What the worker is, or is wanted to be."""
    instance: str = ""
    """Of the worker process, in hex."""
    machine: str = ""
    """Tells machines apart, in hex; what a worker says of itself, no proof."""
    ephemeral: str = ""
    """Fresh X25519 key in hex, of the side that asks a dealer and of the dealer, whose hello says
    nothing else; what comes after it is sealed, another hello first."""


class Layout(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A layer's integers, before their bytes."""

    dtype: Literal["int8", "int16"]
    limbs: int
    outputs: int
    inputs: int
    forward_block: int
    backward_block: int

    @property
    def shape(self) -> tuple[int, int, int]:
        """[L, O, I]."""
        return self.limbs, self.outputs, self.inputs

    @property
    def num_bytes(self) -> int:
        """Of all limbs."""
        return math.prod(self.shape) * (1 if self.dtype == "int8" else 2)

    def check(self) -> None:
        """Refuse what no layer has.

        Raises:
            ProtocolError: a side is out of range.
        """
        sides = (self.outputs, self.inputs, self.forward_block, self.backward_block)
        if self.limbs not in (1, 2) or not all(1 <= side <= _MAX_SIDE for side in sides):
            raise ProtocolError(f"no layer has sides {sides} and {self.limbs} limbs")

    def weight(self, raw: bytearray) -> FieldWeight:
        """The layer; its scales stayed where it came from."""
        kind = np.int8 if self.dtype == "int8" else np.int16
        limbs_LOI = torch.from_numpy(np.frombuffer(raw, dtype=kind)).view(self.shape)
        weight = FieldWeight(
            limbs_LOI=limbs_LOI,
            base=1,
            scale_O=torch.ones(self.outputs),
            blocks_IO=(self.forward_block, self.backward_block),
        )
        low, high = (int(bound) for bound in limbs_LOI.aminmax())
        if max(-low, high) > weight.limit:
            raise ProtocolError(f"integers up to {max(-low, high)}, the most are {weight.limit}")
        return weight


class Failed(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Why a question has no answer."""

    message: str


def told(message: msgspec.Struct) -> bytes:
    """The body of a message."""
    return msgspec.json.encode(message)


def read(frame: Frame, kind: type[T], sender: str) -> T:
    """The message in a frame's body.

    Raises:
        ProtocolError: it is none of this kind.
    """
    try:
        return msgspec.json.decode(bytes(frame.body), type=kind)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise ProtocolError(f"{sender} sent a {frame.kind.name} that is malformed") from error


def from_hex(text: str) -> bytes:
    """The key in a hello.

    Raises:
        ProtocolError: it is none.
    """
    try:
        return bytes.fromhex(text)
    except ValueError as error:
        raise ProtocolError("the hello of a sealed link has no usable key") from error


def layout_of(weight: FieldWeight) -> Layout:
    """What precedes a layer's bytes."""
    limbs, outputs, inputs = weight.limbs_LOI.shape
    return Layout(
        dtype="int8" if weight.limbs_LOI.dtype is torch.int8 else "int16",
        limbs=limbs,
        outputs=outputs,
        inputs=inputs,
        forward_block=weight.blocks_IO[0],
        backward_block=weight.blocks_IO[1],
    )


def layer_key(layout: Layout, raw: bytes | bytearray | memoryview) -> str:
    """Names a layer by its content: two sides with the same base model share it."""
    return hashlib.sha256(told(layout) + b"\0" + hashlib.sha256(raw).digest()).hexdigest()


def tensor_bytes(values: Tensor) -> memoryview:
    """The memory of a contiguous tensor on the CPU."""
    return values.contiguous().numpy().data.cast("B")


def tensor_of(frame: Frame, sender: str) -> Tensor:
    """The int32 tensor [rows, columns] of a frame; its numbers are not checked.

    Raises:
        ProtocolError: the bytes are not as many as the shape says.
    """
    if frame.rows * frame.columns * 4 != len(frame.body) or not frame.body:
        raise ProtocolError(
            f"{sender} sent {len(frame.body)} bytes as [{frame.rows}, {frame.columns}]"
        )
    # A copy where the bytes are immutable: torch wants memory that it may write to.
    data = frame.body if not memoryview(frame.body).readonly else bytearray(frame.body)
    return torch.frombuffer(data, dtype=torch.int32).view(frame.rows, frame.columns)
