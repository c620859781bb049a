"""Linear layers of a trunk in 8 or 4 bits: bitsandbytes quantises them, adapters train beside them.

It does not read weights (`checkpoint`, which hashes them first) nor choose a way (settings). To
adapters the layers are `nn.Linear`. What comes out for a token depends on no other token of its
call, so clients share calls as over full weights; the library's own layer for 8 bits is not used
because there it does: it takes outliers from the call's columns.

Shapes: I and O = input and output features.
"""

from typing import cast

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from cutlayer.errors import ConfigError, ModelError
from cutlayer.model.part_settings import TrunkWeights
from cutlayer.model.partition import PartModule

__all__ = ["bits_of", "check_quantisable", "quantise_block", "require_library", "weight_bytes"]

_BLOCK = 64
"""Weights of one scale."""
_PER_STEP = 1 / 127
"""Of a row's largest weight, which has the largest of the 8 bits' values."""


def require_library() -> None:
    """Raise ConfigError where bitsandbytes is not installed."""
    try:
        import bitsandbytes  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            "model.trunk_weights other than full needs bitsandbytes, which is not installed: "
            'pip install cutlayer[quantised], or set model.trunk_weights = "full"'
        ) from error


def check_quantisable(part: PartModule) -> None:
    """Refuse a part, best before its weights are read, of which layers would stay in full.

    Raises:
        ConfigError: bitsandbytes is not installed.
        ModelError: transposed layers, layers of a kind of their own, or experts.
    """
    require_library()
    kind, advice = part.config.model_type, 'set model.trunk_weights = "full"'
    for name, module in part.named_modules():
        if isinstance(module, nn.Linear | Conv1D) and type(module) is not nn.Linear:
            found = type(module).__name__
            raise ModelError(f"{name} of {kind} is no plain linear layer but {found}; {advice}")
    for name, parameter in part.named_parameters():
        if parameter.ndim > 2:
            raise ModelError(
                f"{kind} keeps its experts in one tensor ({name}), which is not quantised; {advice}"
            )


@torch.no_grad()
def quantise_block(block: nn.Module, weights: TrunkWeights) -> None:
    """Replace the linear layers of a block that has its weights.

    Raises:
        ConfigError: bitsandbytes cannot do it on this device.
    """
    make = {TrunkWeights.INT8: _Int8Linear, TrunkWeights.NF4: _Nf4Linear}[weights]
    layers = {name: m for name, m in block.named_modules() if isinstance(m, nn.Linear)}
    for name, layer in layers.items():
        try:
            block.set_submodule(name, make(layer))
        except RuntimeError as error:
            reason = str(error).splitlines()[0]
            raise ConfigError(
                f"bitsandbytes cannot quantise on {layer.weight.device} ({reason}); see `python -m "
                'bitsandbytes`, or set model.trunk_weights = "full"'
            ) from error


def bits_of(dtype: torch.dtype, weights: TrunkWeights) -> float:
    """Bits of one weight of a large linear layer, its share of the scales included."""
    if weights is TrunkWeights.FULL:
        return 8.0 * dtype.itemsize
    # 4 bits: one of 8 for the scale of a block, and one of 32 for 256 such scales.
    return 8.0 if weights is TrunkWeights.INT8 else 4 + (8 + 32 / 256) / _BLOCK


def weight_bytes(part: nn.Module) -> int:
    """Memory of a part's weights, with the scales of quantised ones."""
    storages = [tensor.untyped_storage() for tensor in (*part.parameters(), *part.buffers())]
    # By place: masked layers show a shape without having it, and some weights share memory.
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


class _Nf4Linear(nn.Linear):
    """Weights in blocks with a scale, 4 bits each; the scales have 8 bits.

    Source: Dettmers et al., QLoRA (arXiv 2305.14314), section 3.
    """

    def __init__(self, whole: nn.Linear) -> None:
        from bitsandbytes import matmul_4bit
        from bitsandbytes.functional import quantize_4bit

        super().__init__(whole.in_features, whole.out_features, bias=False, device="meta")
        # Whole blocks in each row: of others bitsandbytes 0.50's AVX-512 kernel gives back wrong
        # weights without a word, and its fast GPU kernels take none.
        self._padding = (0, -whole.in_features % _BLOCK)
        weight_OI = functional.pad(whole.weight.detach(), self._padding)
        packed, state = quantize_4bit(
            weight_OI, blocksize=_BLOCK, quant_type="nf4", compress_statistics=True
        )
        _stand_for(self, whole, packed)
        self._times, self._state = matmul_4bit, state
        # Named, so that they count as memory.
        self.register_buffer("scales", state.absmax, persistent=False)
        self.register_buffer("scales_of_scales", state.state2.absmax, persistent=False)

    def forward(self, input: Tensor) -> Tensor:
        """Input [.., I] times the weight that the bits stand for, [.., O]."""
        x = functional.pad(input, self._padding) if self._padding[1] else input
        return cast(Tensor, self._times(x, self.weight, self._state, bias=self.bias))


class _Int8Linear(nn.Linear):
    """Weights in 8 bits with a scale per output."""

    scale_O: Tensor

    def __init__(self, whole: nn.Linear) -> None:
        from bitsandbytes.functional import int8_vectorwise_quant

        super().__init__(whole.in_features, whole.out_features, bias=False, device="meta")
        # float16 is all that its GPU kernel takes; it rounds 8 times finer than 8 bits do.
        weight_OI, largest_O, _ = int8_vectorwise_quant(whole.weight.detach().half().contiguous())
        _stand_for(self, whole, weight_OI)
        self.register_buffer("scale_O", largest_O * _PER_STEP, persistent=False)

    def forward(self, input: Tensor) -> Tensor:
        """Input [.., I] times the weight that the bits stand for, [.., O]."""
        found: Tensor = _Int8Product.apply(  # type: ignore[no-untyped-call]
            input, self.weight, self.scale_O, self.bias
        )
        return found


class _Context(FunctionCtx):
    saved_tensors: tuple[Tensor, Tensor]


class _Int8Product(torch.autograd.Function):
    """The weight is widened in each direction anew: kept, it would be in memory in full."""

    @staticmethod
    def forward(
        ctx: _Context, x: Tensor, weight_OI: Tensor, scale_O: Tensor, bias_O: Tensor | None
    ) -> Tensor:
        ctx.save_for_backward(weight_OI, scale_O)
        return functional.linear(x, _widened(weight_OI, scale_O, x.dtype), bias_O)

    @staticmethod
    def backward(ctx: _Context, grad: Tensor) -> tuple[Tensor, None, None, None]:
        weight_OI, scale_O = ctx.saved_tensors
        return grad @ _widened(weight_OI, scale_O, grad.dtype), None, None, None


def _widened(weight_OI: Tensor, scale_O: Tensor, dtype: torch.dtype) -> Tensor:
    return weight_OI.to(dtype).mul_(scale_O[:, None])


def _stand_for(layer: nn.Linear, whole: nn.Linear, kept: Tensor) -> None:
    """Take a layer's place in its model with other bytes for its weight."""
    layer.weight = nn.Parameter(kept, requires_grad=False)
    layer.bias = whole.bias
    # Without values: for whoever asks a part's weights in which type it computes.
    layer.register_parameter("like", nn.Parameter(whole.weight.new_empty(0), requires_grad=False))
