"""Linear layers of which some rows learn: gradients for those rows, and for no other.

It does not choose rows (`sparse_choice`) nor know whose turn it is (`sparse`). The layer's own
weight stays as it is; what was learnt is a difference to the chosen rows.

Shapes: N = tokens, O and I = output and input features, R = rows that learn.
"""

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx
from torch.nn import functional

from cutlayer.model.lora_targets import is_transposed

__all__ = ["RowDelta", "added_rows", "is_cheaper_added", "sparse_linear"]

_COPY_TOKENS = 24
"""A copy of a weight takes as long as its product with about so many tokens, on a CPU."""


@dataclass(frozen=True, kw_only=True)
class RowDelta:
    """What some rows of a layer have learnt."""

    delta_RI: nn.Parameter
    """Float32, added to the chosen rows."""
    rows_R: Tensor
    """Which, int64 and ascending."""


def sparse_linear(layer: nn.Module, x: Tensor, learnt: RowDelta) -> Tensor:
    """The layer with learnt rows, [.., O].

    A dense layer's backward computes two products, with respect to its inputs and to its weight;
    this one computes the first, and of the second the R rows alone.
    """
    weight, bias = cast(Tensor, layer.weight), cast(Tensor | None, layer.bias)
    found: Tensor = _SparseLinear.apply(  # type: ignore[no-untyped-call]
        x, weight, bias, learnt.delta_RI, learnt.rows_R, is_transposed(layer)
    )
    return found


def added_rows(y: Tensor, x: Tensor, learnt: RowDelta) -> Tensor:
    """What the layer's own weight gave, [.., O], plus what the learnt rows add to it."""
    update = functional.linear(x.to(learnt.delta_RI.dtype), learnt.delta_RI)
    return y.index_add(-1, learnt.rows_R, update.to(y.dtype))


def is_cheaper_added(num_tokens: int, learnt: RowDelta, num_outputs: int) -> bool:
    """Whether a second product, with the learnt rows alone, beats a copy of the whole weight."""
    return num_tokens * len(learnt.rows_R) <= _COPY_TOKENS * num_outputs


class _Context(FunctionCtx):
    saved_tensors: tuple[Tensor, Tensor, Tensor, Tensor]
    needs_input_grad: tuple[bool, ...]
    is_transposed: bool


class _SparseLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: _Context,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        delta_RI: Tensor,
        rows_R: Tensor,
        is_transposed: bool,
    ) -> Tensor:
        ctx.save_for_backward(x, weight, delta_RI, rows_R)
        ctx.is_transposed = is_transposed
        whole_OI = _with_rows(weight, delta_RI, rows_R, is_transposed)
        return functional.linear(x, whole_OI, bias)

    @staticmethod
    def backward(
        ctx: _Context, grad: Tensor
    ) -> tuple[Tensor | None, None, None, Tensor | None, None, None]:
        x, weight, delta_RI, rows_R = ctx.saved_tensors
        of_x, of_delta = None, None
        if ctx.needs_input_grad[0]:
            # Made again: kept from the forward, the model would be in memory twice.
            of_x = grad @ _with_rows(weight, delta_RI, rows_R, ctx.is_transposed)
        if ctx.needs_input_grad[3]:
            grad_NO, x_NI = grad.flatten(0, -2), x.flatten(0, -2)
            of_delta = (_columns(grad_NO, rows_R).mT @ x_NI).to(delta_RI.dtype)
        return of_x, None, None, of_delta, None, None


def _with_rows(weight: Tensor, delta_RI: Tensor, rows_R: Tensor, is_transposed: bool) -> Tensor:
    """The layer's weight with its learnt rows, [O, I], in the weight's dtype."""
    weight_OI = weight.mT if is_transposed else weight
    if len(rows_R) == len(weight_OI):
        return (weight_OI + delta_RI).to(weight.dtype)
    rows_RI = (weight_OI.index_select(0, rows_R) + delta_RI).to(weight.dtype)
    return weight_OI.index_copy(0, rows_R, rows_RI)


def _columns(grad_NO: Tensor, rows_R: Tensor) -> Tensor:
    return grad_NO if len(rows_R) == grad_NO.shape[1] else grad_NO.index_select(1, rows_R)
