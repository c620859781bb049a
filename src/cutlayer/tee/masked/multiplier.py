"""Public integers on a device, and their products: the work of an accelerator or a dealer.

It masks, checks and sends nothing. Whoever has a seed knows the pad: a multiplier that is given
seeds must never be given what they mask.

Shapes: N = tokens, K = inputs and M = products of a direction.
"""

import torch
from torch import Tensor

from cutlayer.errors import ConfigError, ProtocolError
from cutlayer.tee.masked.field import CENTRE, PRIME
from cutlayer.tee.masked.kernels import all_products, choose_kernel
from cutlayer.tee.masked.online import OFFSET
from cutlayer.tee.masked.pads import expand
from cutlayer.tee.masked.quantise import FieldWeight

__all__ = ["Multiplier"]


class Multiplier:
    """Holds layers by name and multiplies by them; an `Accelerator` within the process."""

    def __init__(
        self,
        kernel: str = "float64",
        device: str = "cpu",
        max_bytes: int | None = None,
        name: str = "in this process",
    ) -> None:
        """
        Args:
            kernel: of `KERNELS`.
            device: torch device.
            max_bytes: of all layers; None has no limit.
            name: for error messages.

        Raises:
            ConfigError: the device is not there, or the kernel is no good on it.
        """
        self.name = name
        try:
            self._device = torch.device(device)
            torch.empty(0, device=self._device)
        except (RuntimeError, AssertionError) as error:
            reason = str(error).splitlines()[0]
            raise ConfigError(f"device={device} cannot be used here ({reason}); try cpu") from error
        self._kernel = choose_kernel(kernel, self._device)
        self._max_bytes = max_bytes
        self._weights: dict[str, FieldWeight] = {}

    @property
    def num_bytes(self) -> int:
        """Of all layers."""
        return sum(weight.limbs_LOI.nbytes for weight in self._weights.values())

    def hold(self, name: str, weight: FieldWeight) -> None:
        """Keep a layer; one of the same name is replaced.

        Raises:
            ConfigError: there is no room for it.
        """
        self._weights.pop(name, None)
        needed = self.num_bytes + weight.limbs_LOI.nbytes
        if self._max_bytes is not None and needed > self._max_bytes:
            raise ConfigError(
                f"{name} needs {needed} bytes of weights, limit {self._max_bytes}; raise the "
                "worker's max_weight_bytes or mask fewer blocks"
            )
        self._weights[name] = FieldWeight(
            limbs_LOI=weight.limbs_LOI.to(self._device),
            base=weight.base,
            scale_O=weight.scale_O,
            blocks_IO=weight.blocks_IO,
        )

    def forget(self, prefix: str) -> None:
        """Let go of the layers whose names begin so."""
        for name in [name for name in self._weights if name.startswith(prefix)]:
            del self._weights[name]

    def width(self, name: str, transpose: bool) -> int:
        """Inputs K of a layer in a direction.

        Raises:
            ProtocolError: no such layer.
        """
        return self._weight(name).limbs_LOI.shape[1 if transpose else 2]

    def num_products(self, name: str, transpose: bool) -> int:
        """Products M per token.

        Raises:
            ProtocolError: no such layer.
        """
        weight, width = self._weight(name), self.width(name, transpose)
        num_limbs, *sides = weight.limbs_LOI.shape
        return num_limbs * -(-width // weight.blocks_IO[transpose]) * sides[transpose]

    def multiply(self, name: str, masked_NK: Tensor, transpose: bool) -> Tensor:
        """Products mod p, int32 [N, M].

        Raises:
            ProtocolError: no such layer, or an input that is not as wide.
        """
        weight, width = self._weight(name), self.width(name, transpose)
        if masked_NK.ndim != 2 or masked_NK.shape[1] != width or not len(masked_NK):
            raise ProtocolError(f"{name} takes [N, {width}], not {tuple(masked_NK.shape)}")
        inputs = masked_NK.to(self._device)
        return all_products(self._kernel, weight, inputs, transpose).cpu()

    def unmask_NM(self, name: str, seed: bytes, num_tokens: int, transpose: bool) -> Tensor:
        """What takes the pad of a seed off a product: CENTRE - (pad W) mod p.

        Raises:
            ProtocolError: no such layer.
        """
        pad_NK = expand(seed, num_tokens, self.width(name, transpose))
        return self.unmask_of(name, pad_NK, transpose)

    def unmask_of(self, name: str, pad_NK: Tensor, transpose: bool) -> Tensor:
        """As `unmask_NM`, for residues that are expanded already."""
        shifted_NK = torch.remainder(pad_NK.to(torch.int64) + OFFSET, PRIME).to(torch.int32)
        products_NM = self.multiply(name, shifted_NK, transpose)
        taken_NM = CENTRE - products_NM
        return torch.where(taken_NM < 0, taken_NM + PRIME, taken_NM)

    def close(self) -> None:
        """Let go of all layers."""
        self._weights.clear()

    def _weight(self, name: str) -> FieldWeight:
        if name not in self._weights:
            raise ProtocolError(f"no layer {name} is held here; was this worker restarted?")
        return self._weights[name]
