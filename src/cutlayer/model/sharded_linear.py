"""Linear layers of which every rank has a share, one class per style of transformers' `tp_plan`.

It does not choose which layers (`tensor_parallel`) nor talk (`collectives`). An adapter wraps the
inner layer and stays whole: around it, what other ranks hold is zero.

Shapes: I and O = input and output features of the whole layer.
"""

from collections.abc import Callable, Mapping
from typing import cast

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.nn import functional

from cutlayer.model.collectives import (
    Ranks,
    gather_columns,
    own_columns,
    sum_gradient,
    sum_values,
)

__all__ = ["STYLES", "Entry", "Shard"]


class Entry:
    """Where whole tensors enter sharded weights: one sum of gradients for all layers they enter."""

    def __init__(self, ranks: Ranks) -> None:
        self.ranks = ranks
        self._last: tuple[Tensor, Tensor] | None = None

    def __call__(self, x: Tensor) -> Tensor:
        if not (torch.is_grad_enabled() and x.requires_grad):
            return x
        if self._last is None or self._last[0] is not x:
            self._last = (x, sum_gradient(x, self.ranks))
        return self._last[1]

    def forget(self) -> None:
        """Free the last tensor."""
        self._last = None


class Shard(nn.Module):
    """One linear layer of which this rank has a share; an adapter wraps `inner`."""

    def __init__(self, inner: nn.Linear, entry: Entry, split_dims: Mapping[str, int]) -> None:
        super().__init__()
        self.inner: nn.Module = inner
        self.entry = entry
        self.ranks = entry.ranks
        self.split_dims = split_dims
        """Each tensor that is shared out -> along which dimension."""


class _Columns(nn.Linear):
    """Some outputs of a linear layer. Called, it gives all of them, the others as zeros [.., O]."""

    def __init__(self, whole: nn.Linear, ranks: Ranks) -> None:
        own = whole.out_features // ranks.size
        has_bias = whole.bias is not None
        super().__init__(whole.in_features, own, has_bias, device="meta", dtype=whole.weight.dtype)
        # An adapter is whole: PEFT sizes it by these.
        self.out_features = whole.out_features
        self._margins = (own * ranks.rank, own * (ranks.size - ranks.rank - 1))

    def own(self, x: Tensor) -> Tensor:
        """The outputs of this rank alone."""
        return functional.linear(x, self.weight, self.bias)

    def forward(self, x: Tensor) -> Tensor:
        return functional.pad(self.own(x), self._margins)


class _RowsOf(nn.Linear):
    """Some inputs of a linear layer, without its bias. Called, it takes all of them [.., I]."""

    def __init__(self, whole: nn.Linear, ranks: Ranks) -> None:
        own = whole.in_features // ranks.size
        super().__init__(own, whole.out_features, False, device="meta", dtype=whole.weight.dtype)
        self.in_features = whole.in_features
        self._ranks = ranks
        self._margins = (own * ranks.rank, own * (ranks.size - ranks.rank - 1))

    def own(self, x: Tensor) -> Tensor:
        """Partial sums from this rank's inputs alone."""
        return functional.linear(x, self.weight)

    def widened(self, x: Tensor) -> Tensor:
        """This rank's inputs among zeros."""
        return functional.pad(x, self._margins)

    def forward(self, x: Tensor) -> Tensor:
        return self.own(self._ranks.own(x, -1))


class _ColumnParallel(Shard):
    """Whole inputs, own outputs."""

    def __init__(self, whole: nn.Linear, entry: Entry) -> None:
        super().__init__(_Columns(whole, entry.ranks), entry, {"weight": 0, "bias": 0})

    def forward(self, x: Tensor) -> Tensor:
        x = self.entry(x)
        if isinstance(self.inner, _Columns):
            return self.inner.own(x)
        return self.ranks.own(self.inner(x), -1).contiguous()


class _GatheredColumnParallel(_ColumnParallel):
    """Whole inputs, whole outputs: what follows needs all of them."""

    def forward(self, x: Tensor) -> Tensor:
        return gather_columns(super().forward(x), self.ranks)


class _RowParallel(Shard):
    """Own inputs, whole outputs."""

    def __init__(self, whole: nn.Linear, entry: Entry) -> None:
        super().__init__(_RowsOf(whole, entry.ranks), entry, {"weight": 1})
        self.bias = None if whole.bias is None else nn.Parameter(torch.empty_like(whole.bias))

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(self.inner, _RowsOf):
            partial = self.inner.own(x)
        else:
            base = cast(_RowsOf, cast(LoraLayer, self.inner).base_layer)
            partial = self.inner(base.widened(x))
        y = sum_values(partial, self.ranks)
        return y if self.bias is None else y + self.bias


class _SplitRowParallel(_RowParallel):
    """Whole inputs, whole outputs: what came before needed all of them."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(own_columns(x, self.ranks))


STYLES: Mapping[str, Callable[[nn.Linear, Entry], Shard]] = {
    "colwise": _ColumnParallel,
    "colwise_gather_output": _GatheredColumnParallel,
    "rowwise": _RowParallel,
    "rowwise_split_input": _SplitRowParallel,
}
