"""Masked integers travel exactly, and cannot be taken for activations."""

import pytest
import torch

from cutlayer.errors import ConfigError, ProtocolError
from cutlayer.wire import codec, frame
from cutlayer.wire.endpoints import ConnectionSettings
from cutlayer.wire.federation_messages import SendUpdate
from cutlayer.wire.frame import Frame
from cutlayer.wire.messages import Kind
from cutlayer.wire.packed import Packed
from cutlayer.wire.ring import decode_any, pack_ring, unpack_ring

_EDGES = [0, 1, -1, 2**63 - 1, -(2**63), 0x0102030405060708]


@pytest.mark.parametrize("shape", [(6,), (2, 3), (6, 1)])
def test_every_integer_comes_back(shape: tuple[int, ...]) -> None:
    x = torch.tensor(_EDGES).reshape(shape)
    packed = pack_ring(x)
    assert packed.num_bytes == 48
    assert torch.equal(unpack_ring(packed), x)
    assert torch.equal(decode_any(packed), x)


def test_bytes_are_little_endian() -> None:
    assert bytes(pack_ring(torch.tensor(_EDGES[5:])).buffers[0]) == bytes(range(8, 0, -1))


@pytest.mark.parametrize("shape", [(0,), (3, 0)])
def test_no_values_have_no_bytes(shape: tuple[int, ...]) -> None:
    packed = pack_ring(torch.zeros(shape, dtype=torch.int64))
    assert packed.num_bytes == 0
    assert unpack_ring(packed).shape == shape


@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8, torch.bool, torch.float32])
def test_other_types_are_refused(dtype: torch.dtype) -> None:
    with pytest.raises(ProtocolError, match="masked int64"):
        pack_ring(torch.ones(3, dtype=dtype))


def test_it_travels_in_a_frame() -> None:
    call = SendUpdate(federation="f", round=1, attempt=1, weight=0)
    x = torch.tensor(_EDGES)
    data = bytearray().join(frame.encode(Frame(Kind.SEND_UPDATE, call, {"masked": pack_ring(x)})))
    assert torch.equal(unpack_ring(frame.decode(data).tensors["masked"]), x)


def test_it_is_refused_as_codec_of_a_connection() -> None:
    with pytest.raises(ConfigError, match="choose one of bf16, fp8, int8, raw"):
        codec.get_codec("ring64")
    with pytest.raises(ConfigError, match="secure aggregation"):
        codec.encode(torch.ones(3), "ring64")
    with pytest.raises(ValueError, match="secure aggregation"):
        ConnectionSettings(address="127.0.0.1:1", plaintext=True, codec="ring64")


def test_it_is_refused_where_an_activation_is_meant() -> None:
    with pytest.raises(ProtocolError, match="floating-point values are meant"):
        codec.decode(pack_ring(torch.ones(3, dtype=torch.int64)))


def test_an_activation_is_refused_where_masked_integers_are_meant() -> None:
    packed = codec.encode(torch.ones(3))
    with pytest.raises(ProtocolError, match="masked integers"):
        unpack_ring(packed)
    assert torch.equal(decode_any(packed), torch.ones(3))


@pytest.mark.parametrize(
    ("shape", "dtype", "buffers", "text"),
    [
        ((3,), "float32", (bytes(24),), "masked integers"),
        ((3,), "int64", (bytes(23),), "needs buffers of"),
        ((3,), "int64", (bytes(24), b""), "needs buffers of"),
        ((-3,), "int64", (b"",), "shape"),
        ((1 << 30, 1 << 30), "int64", (b"",), "shape"),
        ((1,) * 9, "int64", (bytes(8),), "shape"),
    ],
)
def test_hostile_bytes_are_refused(
    shape: tuple[int, ...], dtype: str, buffers: tuple[bytes, ...], text: str
) -> None:
    with pytest.raises(ProtocolError, match=text):
        unpack_ring(Packed(codec="ring64", dtype=dtype, shape=shape, buffers=buffers))
