"""Every registered codec keeps the promises of docs/wire.md; shapes: R rows, W width."""

import pytest
import torch
from torch import Tensor

from cutlayer.errors import ConfigError, ProtocolError
from cutlayer.registry import Registry
from cutlayer.wire import codec as codecs
from cutlayer.wire.codec import CODECS, Packed, get_codec

HIDDEN = 576
RELATIVE_ERROR = {"raw": 0.0, "bf16": 1.8e-3, "fp8": 2.8e-2, "int8": 6e-3}
"""Relative L2 error on Gaussian values, the bound that docs/wire.md states."""
BYTES_PER_VALUE = {"raw": 4.0, "bf16": 2.0, "fp8": 1.01, "int8": 1.0625}


def gaussian(*shape: int, scale: float = 1.0, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale


def relative_error(x: Tensor, y: Tensor) -> float:
    return float((x.double() - y.double()).norm() / x.double().norm())


def with_buffer(packed: Packed, index: int, data: bytes) -> Packed:
    buffers = [bytes(buffer) for buffer in packed.buffers]
    buffers[index] = data
    return Packed(
        codec=packed.codec, dtype=packed.dtype, shape=packed.shape, buffers=tuple(buffers)
    )


@pytest.mark.parametrize("name", list(CODECS))
class TestEveryCodec:
    """The conformance tests of the Codec protocol."""

    def test_round_trip_error_is_within_the_documented_bound(self, name: str) -> None:
        x_RW = gaussian(64, HIDDEN)
        y_RW = codecs.decode(codecs.encode(x_RW, name))
        assert y_RW.dtype == torch.float32
        assert relative_error(x_RW, y_RW) <= RELATIVE_ERROR[name]

    @pytest.mark.parametrize("scale", [1e-9, 1e-30, 1e30])
    def test_magnitude_does_not_change_the_relative_error(self, name: str, scale: float) -> None:
        x_RW = gaussian(8, HIDDEN, scale=scale)
        assert relative_error(x_RW, codecs.decode(codecs.encode(x_RW, name))) <= (
            RELATIVE_ERROR[name] * 1.05
        )

    @pytest.mark.parametrize(
        "shape", [(), (1,), (7,), (0, 5), (5, 0), (0,), (1, 1), (1, 576), (3, 33), (2, 3, 40)]
    )
    def test_any_shape_comes_back(self, name: str, shape: tuple[int, ...]) -> None:
        x = gaussian(*shape)
        packed = codecs.encode(x, name)
        y = codecs.decode(packed)
        assert y.shape == x.shape
        assert torch.allclose(x, y, atol=0.13 * float(x.abs().max()) if x.numel() else 0.0)
        lengths = tuple(len(buffer) for buffer in packed.buffers)
        assert lengths == get_codec(name).layout(packed.shape, packed.dtype)

    def test_bytes_per_value_are_as_documented(self, name: str) -> None:
        assert codecs.encode(gaussian(4, HIDDEN), name).num_bytes <= (
            4 * HIDDEN * BYTES_PER_VALUE[name]
        )

    def test_zero_rows_stay_zero_beside_others(self, name: str) -> None:
        x_RW = gaussian(3, HIDDEN)
        x_RW[1] = 0.0
        y_RW = codecs.decode(codecs.encode(x_RW, name))
        assert torch.equal(y_RW[1], x_RW[1])
        assert relative_error(x_RW, y_RW) <= RELATIVE_ERROR[name]

    @pytest.mark.parametrize("value", [3.4028e38, -3.4028e38, 1.2e-38, 1e-42])
    def test_extreme_values_stay_finite(self, name: str, value: float) -> None:
        x_RW = torch.full((2, 40), value)
        y_RW = codecs.decode(codecs.encode(x_RW, name))
        assert torch.isfinite(y_RW).all()
        assert torch.allclose(x_RW, y_RW, rtol=0.02, atol=1e-39)

    def test_a_row_is_coded_alone(self, name: str) -> None:
        x_RW = gaussian(5, 45)
        x_RW[0] *= 1000.0
        together = codecs.decode(codecs.encode(x_RW, name))
        alone = torch.cat([codecs.decode(codecs.encode(row, name)) for row in x_RW.split(1)])
        assert torch.equal(together, alone)

    @pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
    def test_encode_refuses_what_is_not_finite(self, name: str, value: float) -> None:
        x_RW = gaussian(2, 40)
        x_RW[1, 39] = value
        with pytest.raises(ProtocolError, match="NaN or infinite"):
            codecs.encode(x_RW, name)

    def test_decode_refuses_what_is_not_finite(self, name: str) -> None:
        packed = codecs.encode(gaussian(2, 40), name)
        last = len(packed.buffers) - 1
        with pytest.raises(ProtocolError, match="NaN or infinite"):
            codecs.decode(with_buffer(packed, last, b"\xff" * len(packed.buffers[last])))

    def test_decode_refuses_buffers_of_another_size(self, name: str) -> None:
        packed = codecs.encode(gaussian(2, 40), name)
        for index, buffer in enumerate(packed.buffers):
            for wrong in (bytes(buffer)[:-1], bytes(buffer) + b"\0", b""):
                with pytest.raises(ProtocolError, match="needs buffers of"):
                    codecs.decode(with_buffer(packed, index, wrong))

    @pytest.mark.parametrize("shape", [(-1, 40), (2, -40), (1 << 30, 1 << 30), (1,) * 9])
    def test_decode_refuses_impossible_shapes(self, name: str, shape: tuple[int, ...]) -> None:
        packed = codecs.encode(gaussian(2, 40), name)
        with pytest.raises(ProtocolError, match="shape"):
            codecs.decode(
                Packed(codec=name, dtype=packed.dtype, shape=shape, buffers=packed.buffers)
            )

    def test_decode_refuses_a_dtype_that_the_codec_does_not_make(self, name: str) -> None:
        packed = codecs.encode(gaussian(2, 40), name)
        with pytest.raises(ProtocolError, match="int64"):
            codecs.decode(
                Packed(codec=name, dtype="int64", shape=packed.shape, buffers=packed.buffers)
            )

    @pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.bool, torch.uint8])
    def test_token_ids_and_masks_have_no_wire_form(self, name: str, dtype: torch.dtype) -> None:
        with pytest.raises(ProtocolError, match="may leave"):
            codecs.encode(torch.ones(3, dtype=dtype), name)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
    def test_other_floating_types_are_taken(self, name: str, dtype: torch.dtype) -> None:
        x = gaussian(3, 40).to(dtype)
        y = codecs.decode(codecs.encode(x, name))
        assert y.dtype == (dtype if name == "raw" else torch.float32)
        assert torch.allclose(x.float(), y.float(), rtol=0.07, atol=0.05)

    def test_strided_tensors_and_graphs_are_taken(self, name: str) -> None:
        x = gaussian(40, 3).t().requires_grad_()
        y = codecs.decode(codecs.encode(x * 1.0, name))
        assert torch.allclose(x, y, rtol=0.07, atol=0.05)

    def test_encoding_leaves_the_tensor_as_it_was(self, name: str) -> None:
        x = gaussian(3, 40)
        before = x.clone()
        codecs.decode(codecs.encode(x, name))
        assert torch.equal(x, before)

    def test_read_only_and_writable_buffers_decode_alike(self, name: str) -> None:
        packed = codecs.encode(gaussian(3, 40), name)
        frozen = with_buffer(packed, 0, bytes(packed.buffers[0]))
        assert torch.equal(codecs.decode(packed), codecs.decode(frozen))


def test_raw_is_exact_and_shares_memory_with_the_tensor() -> None:
    x = gaussian(3, 40)
    packed = codecs.encode(x, "raw")
    assert torch.equal(codecs.decode(packed), x)
    x[0, 0] = 5.0
    assert codecs.decode(packed)[0, 0] == 5.0


def test_fp8_keeps_small_values_beside_an_outlier_channel() -> None:
    x_RW = gaussian(16, HIDDEN)
    x_RW[:, 7] *= 300.0
    others = [column for column in range(HIDDEN) if column != 7]
    y_RW = codecs.decode(codecs.encode(x_RW, "fp8"))
    assert relative_error(x_RW[:, others], y_RW[:, others]) < 0.03


def test_table_decoding_of_fp8_equals_torch() -> None:
    every_byte = torch.arange(256, dtype=torch.uint8)
    finite = every_byte[(every_byte & 0x7F) != 0x7F]
    one = torch.ones(1, dtype=torch.bfloat16).view(torch.uint8).numpy().tobytes()
    packed = Packed(
        codec="fp8", dtype="float32", shape=(254,), buffers=(finite.numpy().tobytes(), one)
    )
    assert torch.equal(codecs.decode(packed), finite.view(torch.float8_e4m3fn).float())


def test_unknown_codec_of_a_setting_lists_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="'zip'; known: bf16, fp8, int8, raw"):
        get_codec("zip")


def test_unknown_codec_of_a_peer_is_a_protocol_error() -> None:
    with pytest.raises(ProtocolError, match="unknown codec 'zip'; known: bf16"):
        codecs.decode(Packed(codec="zip", dtype="float32", shape=(0,), buffers=(b"",)))


def test_a_name_cannot_be_registered_twice() -> None:
    registry: Registry[object] = Registry("thing")
    registry.register("a")(object)
    with pytest.raises(AssertionError, match="twice"):
        registry.register("a")(object)
