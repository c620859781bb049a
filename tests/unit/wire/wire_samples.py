"""A frame of every kind, built from the header types so that a new message is covered by itself."""

import msgspec
import torch
from msgspec import inspect

from cutlayer.wire import codec, frame
from cutlayer.wire.frame import Frame
from cutlayer.wire.messages import HEADERS

__all__ = ["joined", "sample_frames"]


def joined(message: Frame) -> bytearray:
    """The encoded frame in one writable piece."""
    return bytearray().join(frame.encode(message))


def sample_frames() -> list[Frame]:
    """One frame per kind, each with a tensor of every codec."""
    x = torch.linspace(-3, 3, 66).reshape(2, 33)
    tensors = {name: codec.encode(x, name) for name in codec.CODECS}
    frames = []
    for number, (kind, header) in enumerate(HEADERS.items(), start=1):
        value = msgspec.convert(_sample(inspect.type_info(header)), header)
        frames.append(Frame(kind, value, tensors, call_id=number))
    return frames


def _sample(info: inspect.Type) -> object:
    match info:
        case inspect.StructType(fields=fields):
            return [_sample(field.type) for field in fields]
        case inspect.DictType(key_type=key, value_type=value):
            return {_sample(key): _sample(value)}
        case inspect.ListType(item_type=item):
            return [_sample(item), _sample(item)]
        case inspect.UnionType(types=types):
            return _sample(types[0])
        case inspect.BytesType():
            return b"some bytes"
        case inspect.StrType():
            return "some text"
        case inspect.BoolType():
            return True
        case inspect.IntType():
            return 300
        case inspect.FloatType():
            return 1.5
        case inspect.NoneType():
            return None
    raise AssertionError(f"no sample for {info}")
