"""Exact products of residues with small public integers, one class per way to compute them.

A new way is a class under `@KERNELS.register`; the conformance suite runs over all of them. None
hides or checks anything: this is what an accelerator, a dealer or an idle CPU does.

Shapes: N = tokens, K = contracted features, O = outputs.
"""

from typing import Protocol

import torch
from torch import Tensor

from cutlayer.errors import ConfigError
from cutlayer.registry import Registry
from cutlayer.tee.masked.field import PRIME, centred, residues
from cutlayer.tee.masked.quantise import FieldWeight

__all__ = ["KERNELS", "Kernel", "all_products", "choose_kernel"]

_MAX_SLICE = {"cpu": 1 << 20, "cuda": 1 << 26}
"""Weights that are widened at once: on a CPU, what stays in its cache."""


class Kernel(Protocol):
    """One exact matrix product modulo p."""

    def multiply(self, x_NK: Tensor, weight_OK: Tensor, limit: int) -> Tensor:
        """x W^T mod p as int32 residues [N, O].

        Args:
            x_NK: int32 residues.
            weight_OK: int8 or int16.
            limit: no weight is larger, positive or negative.
        """


KERNELS: Registry[Kernel] = Registry("kernel for masked products")


def all_products(kernel: Kernel, weight: FieldWeight, x_NK: Tensor, transpose: bool) -> Tensor:
    """Products of every limb and block, int32 residues [N, M] in the order of `quantise.Span`.

    Args:
        kernel: how.
        weight: the layer.
        x_NK: int32 residues on the weight's device.
        transpose: backward: x is a gradient by the layer's outputs.
    """
    inputs = x_NK.split(weight.blocks_IO[transpose], dim=1)
    return torch.cat(
        [
            kernel.multiply(inputs[number % len(inputs)], matrix, weight.limit)
            for number, matrix in enumerate(weight.pieces(transpose))
        ],
        dim=1,
    )


def choose_kernel(name: str, device: torch.device) -> Kernel:
    """The kernel of that name, if it is no trap on this device.

    Raises:
        ConfigError: unknown, or int8 on a CPU: without VNNI it takes minutes.
    """
    kernel = KERNELS.get(name)
    if name == "int8" and device.type != "cuda":
        raise ConfigError(f"kernel int8 is for cuda, not {device.type}; choose float64")
    return kernel


@KERNELS.register("float64")
class _Float64:
    """Products of 31-bit residues add up exactly in 53 bits, so many at a time."""

    def multiply(self, x_NK: Tensor, weight_OK: Tensor, limit: int) -> Tensor:
        wide_NK = x_NK.to(torch.float64)
        depth = max(1, 2**22 // limit)
        most = _MAX_SLICE.get(x_NK.device.type, 1 << 24)
        height = max(1, most // min(depth, x_NK.shape[1]))
        pieces = [_in_float64(wide_NK, rows, depth) for rows in weight_OK.split(height)]
        return torch.cat(pieces, dim=1)


@KERNELS.register("float32")
class _Float32:
    """Four bytes of a residue apart, few products at a time; for GPUs that are slow in float64."""

    def multiply(self, x_NK: Tensor, weight_OK: Tensor, limit: int) -> Tensor:
        depth = max(1, 2**24 // (255 * limit))
        total = torch.zeros(
            x_NK.shape[0], weight_OK.shape[0], dtype=torch.int64, device=x_NK.device
        )
        for x_Nk, weight_Ok in zip(
            x_NK.split(depth, dim=1), weight_OK.split(depth, dim=1), strict=True
        ):
            weight = weight_Ok.to(torch.float32).mT
            for shift in (0, 8, 16, 24):
                limb = ((x_Nk >> shift) & 255).to(torch.float32)
                total += (limb @ weight).to(torch.int64) << shift
            total = torch.remainder(total, PRIME)
        return total.to(torch.int32)


@KERNELS.register("int8")
class _Int8:
    """Signed bytes of both sides through the integer units of a GPU."""

    def multiply(self, x_NK: Tensor, weight_OK: Tensor, limit: int) -> Tensor:
        x_limbs = _digits(_padded(centred(x_NK), 0, 32), 4)
        weights = _digits(_padded(weight_OK.to(torch.int64), 0, 8), 1 if limit <= 127 else 2)
        total = torch.zeros(1, dtype=torch.int64, device=x_NK.device)
        for i, x_limb in enumerate(x_limbs):
            for j, weight in enumerate(weights):
                product = _int8_product(x_limb, weight)
                total = total + torch.remainder(product << (8 * (i + j)), PRIME)
        return residues(total[: x_NK.shape[0], : weight_OK.shape[0]])


def _in_float64(wide_NK: Tensor, weight_OK: Tensor, depth: int) -> Tensor:
    total: Tensor | None = None
    for x_Nk, weight_Ok in zip(
        wide_NK.split(depth, dim=1), weight_OK.split(depth, dim=1), strict=True
    ):
        part = torch.remainder(x_Nk @ weight_Ok.to(torch.float64).mT, PRIME)
        total = part if total is None else torch.remainder(total + part, PRIME)
    assert total is not None
    return total.to(torch.int32)


def _padded(values: Tensor, value: int, multiple: int) -> Tensor:
    """Rows up to a multiple, columns to one of 32: what the integer units want."""
    rows, columns = -values.shape[0] % multiple, -values.shape[1] % 32
    return torch.nn.functional.pad(values, (0, columns, 0, rows), value=value)


def _digits(values: Tensor, count: int) -> list[Tensor]:
    """Signed base-256 digits, lowest first; they fit because a centred residue has 30 bits."""
    found = []
    for _ in range(count):
        digit = ((values + 128) & 255) - 128
        found.append(digit.to(torch.int8))
        values = (values - digit) >> 8
    return found


def _int8_product(x_NK: Tensor, weight_OK: Tensor) -> Tensor:
    """In int64, exact: at most 2^16 products of 2^14 in an int32 sum."""
    pieces = zip(x_NK.split(2**16, dim=1), weight_OK.split(2**16, dim=1), strict=True)
    return sum(
        (torch._int_mm(x.contiguous(), w.contiguous().mT).to(torch.int64) for x, w in pieces),
        start=torch.zeros(1, dtype=torch.int64, device=x_NK.device),
    )
