"""A frozen linear layer whose multiplications run elsewhere, on masked numbers; forward and back.

It holds no weights: what is inside are the layer's scales, its bias and the secrets of its check.
The module looks like the `nn.Linear` that it replaces, so that adapters go on it as on any other;
its `weight` is a placeholder of integers without memory: whatever computes with it fails aloud.

Shapes: N = tokens, I and O = input and output features.
"""

import threading
from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable

from cutlayer.errors import PeerMisbehaved
from cutlayer.tee.masked.freivalds import CheckKey
from cutlayer.tee.masked.offload import Accelerator, PadSource
from cutlayer.tee.masked.online import Decoder, OnlineCall
from cutlayer.tee.masked.pads import watch_forks
from cutlayer.tee.masked.quantise import FieldWeight

__all__ = ["MaskedLinear", "MaskedPlace"]

_MAX_CALL_WORDS = 1 << 24
"""Residues of one message at most, where a single token has no more."""


class MaskedPlace:
    """Whom the masked layers of one part work with, until the first wrong answer."""

    def __init__(self, accelerator: Accelerator, pads: PadSource) -> None:
        """
        Args:
            accelerator: multiplies; sees masked numbers alone.
            pads: gives pads and their products; never the accelerator itself.
        """
        self.accelerator = accelerator
        self.pads = pads
        self._refusal: PeerMisbehaved | None = None
        self._lock = threading.Lock()
        watch_forks(self)

    def after_fork(self) -> None:
        """In the child: the lock may be held by a thread that does not exist here."""
        self._lock = threading.Lock()

    def hold(self, name: str, weight: FieldWeight) -> None:
        """Give a layer's public integers to whoever multiplies by them."""
        self.accelerator.hold(name, weight)
        self.pads.hold(name, weight)

    def multiply(self, name: str, x_NK: Tensor, way: "_Way") -> Tensor:
        """One product, in float32.

        Raises:
            PeerMisbehaved: a product was wrong, now or ever before: each answer to a wrong one
                would tell a little about the secrets of the check.
            CacheFull: no pad is ready and the settings say not to wait.
            TransportError: the accelerator, or who makes pads, is gone or silent.
        """
        with self._lock:
            if self._refusal is not None:
                raise PeerMisbehaved(str(self._refusal))
            span = way.decoder.span
            most = max(1, _MAX_CALL_WORDS // max(span.num_inputs, span.num_products))
            try:
                return torch.cat([self._multiply(name, x_nK, way) for x_nK in x_NK.split(most)])
            except PeerMisbehaved as error:
                self._refusal = error
                raise

    def close(self) -> None:
        """Let go of both."""
        self.accelerator.close()
        self.pads.close()

    def _multiply(self, name: str, x_NK: Tensor, way: "_Way") -> Tensor:
        call = OnlineCall(x_NK, way.decoder, way.key)
        pad = self.pads.take(name, len(x_NK), way.transpose)
        masked_NK = call.mask(pad)
        products_NM = self.accelerator.multiply(name, masked_NK, way.transpose)
        sender = f"accelerator {self.accelerator.name} or pad source {self.pads.name}"
        return call.unmask(products_NM, pad.unmask_NM(), f"{sender} ({name})")


class _Way:
    """One direction of one layer."""

    def __init__(self, weight: FieldWeight, transpose: bool) -> None:
        self.transpose = transpose
        # A gradient is multiplied by the scales of the outputs before, an output after.
        scale_O = None if transpose else weight.scale_O
        self.decoder = Decoder(span=weight.span(transpose), base=weight.base, scale_O=scale_O)
        self.key = CheckKey(weight, transpose)


class MaskedLinear(nn.Linear):
    """Stands where a frozen linear layer was."""

    def __init__(
        self,
        name: str,
        weight: FieldWeight,
        place: MaskedPlace,
        bias_O: Tensor | None,
    ) -> None:
        """
        Args:
            name: of the layer in the unsplit model; tells it apart at the accelerator.
            weight: its integers; handed to the place and not kept.
            place: who multiplies.
            bias_O: stays inside.
        """
        _, num_outputs, num_inputs = weight.limbs_LOI.shape
        super().__init__(num_inputs, num_outputs, bias=False, device="meta")
        nothing = torch.zeros(1, 1, dtype=torch.int8).expand(num_outputs, num_inputs)
        self.weight = nn.Parameter(nothing, requires_grad=False)
        if bias_O is not None:
            self.bias = nn.Parameter(bias_O.detach(), requires_grad=False)
        self.name = name
        self._scale_O = weight.scale_O
        self._ways = (_Way(weight, False), _Way(weight, True))
        self._place = place
        place.hold(name, weight)

    def forward(self, input: Tensor) -> Tensor:
        """Masked x W^T + bias; [.., I] to [.., O]."""
        x_NI = input.reshape(-1, self.in_features)
        y_NO = cast(Tensor, _Masked.apply(x_NI, self.times))  # type: ignore[no-untyped-call]
        y = y_NO.view(*input.shape[:-1], self.out_features)
        return y if self.bias is None else y + self.bias

    def times(self, x_NK: Tensor, transpose: bool) -> Tensor:
        """x W^T, or g W of a gradient; without bias, outside of any graph."""
        dtype, wide_NK = x_NK.dtype, x_NK.detach().to(torch.float32)
        if transpose:
            wide_NK = wide_NK * self._scale_O
        if not len(wide_NK):
            width = self.in_features if transpose else self.out_features
            return wide_NK.new_zeros(0, width, dtype=dtype)
        return self._place.multiply(self.name, wide_NK, self._ways[transpose]).to(dtype)


class _MaskedContext(FunctionCtx):
    times: Callable[[Tensor, bool], Tensor]


class _Masked(torch.autograd.Function):
    """Both directions are products with a matrix that never changes: nothing is saved."""

    @staticmethod
    def forward(
        ctx: _MaskedContext, x_NI: Tensor, times: Callable[[Tensor, bool], Tensor]
    ) -> Tensor:
        ctx.times = times
        return times(x_NI, False)

    @staticmethod
    @once_differentiable
    def backward(ctx: _MaskedContext, grad_NO: Tensor) -> tuple[Tensor, None]:
        return ctx.times(grad_NO, True), None
