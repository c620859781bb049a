"""LoRA of several adapters in one call of a part.

It does not make, load or remove weights (`lora`) nor know clients. The base layers see all
tokens in one multiplication; each segment adds the update of its own adapter, and only that
adapter's weights are in its graph: values of one segment cannot reach another's gradients.

Shapes: N = tokens of the call, I and O = input and output features, r = rank, G = segments of
equal length, L = that length.
"""

from collections.abc import Sequence

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from cutlayer.model.adapter_slots import DropoutDraws, Segment, merged_segments, pieces_of
from cutlayer.model.families import rotates_by_batch
from cutlayer.model.partition import PartModule

__all__ = ["SharedLora", "can_share_calls"]

_RANDOM = ("drop", "jitter", "noise")
"""What modules call the strength of random numbers that they draw in training."""


class SharedLora:
    """LoRA layers in calls that several adapters share."""

    def __init__(self) -> None:
        self._call: _SegmentedCall | None = None
        self._hooked: set[int] = set()

    def begin(self, segments: Sequence[Segment] | None, layers: Sequence[LoraLayer]) -> None:
        """The next call of the layers has these segments; None ends that."""
        self._call = None if segments is None else _SegmentedCall(segments)
        for layer in layers if segments is not None else ():
            if id(layer) not in self._hooked:
                self._hooked.add(id(layer))
                layer.register_forward_hook(self._add_update)

    def _add_update(
        self, layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor
    ) -> Tensor | None:
        if self._call is None:
            return None
        assert isinstance(layer, LoraLayer)
        return self._call.add_update(layer, inputs[0], output)


class _SegmentedCall:
    """One call of a part; each segment drops its own places, whoever else is in the call."""

    def __init__(self, segments: Sequence[Segment]) -> None:
        self._segments = merged_segments(segments)
        self._draws = [_draws_of(segment) for segment in self._segments]

    def add_update(self, layer: LoraLayer, x: Tensor, output: Tensor) -> Tensor:
        """What the base layer gave plus each segment's update, in the base layer's dtype."""
        known = [s.adapter if s.adapter in layer.lora_A else None for s in self._segments]
        if not any(known):
            return output
        if len(known) == 1:
            # PEFT's own order of operations, so that one adapter alone gives PEFT's own bits.
            update = _update(layer, known[0], self._dropped(layer, 0, x), scales_rank=False)
            return (output + update).to(output.dtype)
        x_NI = x.reshape(-1, x.shape[-1])
        update_NO = self._grouped(layer, known, x_NI)
        return (output + update_NO.view(output.shape)).to(output.dtype)

    def _grouped(self, layer: LoraLayer, known: Sequence[str | None], x_NI: Tensor) -> Tensor:
        sizes = [segment.num_tokens for segment in self._segments]
        pieces = pieces_of(x_NI, self._segments)
        dropped = [self._dropped(layer, i, x_nI) for i, x_nI in enumerate(pieces)]
        if len(set(sizes)) == 1 and None not in known and _are_alike(layer, known):
            return _stacked_update(layer, known, dropped)
        return torch.cat([_update(layer, *pair) for pair in zip(known, dropped, strict=True)])

    def _dropped(self, layer: LoraLayer, index: int, x: Tensor) -> Tensor:
        """A segment's input in its adapter's dtype, without the places that it drops."""
        segment = self._segments[index]
        if segment.adapter not in layer.lora_A:
            return x
        x = x.to(layer.lora_A[segment.adapter].weight.dtype)
        share = getattr(layer.lora_dropout[segment.adapter], "p", 0.0)
        draws = self._draws[index]
        if share == 0.0 or draws is None:
            return x
        # As torch's dropout on the CPU computes it, but from a generator of the segment's own.
        kept = torch.empty_like(x).bernoulli_(1 - share, generator=draws.on(x.device))
        return x * kept.div_(1 - share)


def can_share_calls(part: PartModule) -> bool:
    """Whether rows of several clients may go through one call of this part.

    False where a row's numbers in training would depend on the others: a base model with dropout
    or router noise of its own, rotary embeddings that change with the longest row of a call, and
    linear layers that see a choice of the tokens (experts kept as modules).

    Args:
        part: without adapters so far: their dropout is no hindrance.
    """
    is_random = any(_draws(module) for module in part.base.modules())
    chooses = any(
        isinstance(module, (nn.Linear, Conv1D)) and "experts" in name.split(".")
        for name, module in part.base.named_modules()
    )
    return not is_random and not chooses and rotates_by_batch(part.config) is None


def _draws_of(segment: Segment) -> DropoutDraws | None:
    if segment.draws is not None or segment.dropout_seed is None:
        return segment.draws
    return DropoutDraws(segment.dropout_seed)


def _draws(module: nn.Module) -> bool:
    if isinstance(module, nn.modules.dropout._DropoutNd):
        return module.p > 0
    return any(
        isinstance(value, float) and value > 0 and any(word in name for word in _RANDOM)
        for name, value in vars(module).items()
    )


def _update(layer: LoraLayer, name: str | None, x: Tensor, scales_rank: bool = True) -> Tensor:
    """scaling * B(A(x)); zero without an adapter."""
    if name is None:
        return torch.zeros(*x.shape[:-1], layer.out_features, device=x.device)
    a, b, scaling = layer.lora_A[name], layer.lora_B[name], layer.scaling[name]
    # Of several segments the smaller of the two tensors is scaled; PEFT scales the larger.
    update: Tensor = b(a(x) * scaling) if scales_rank else b(a(x)) * scaling
    return update


def _are_alike(layer: LoraLayer, names: Sequence[str | None]) -> bool:
    return len({(layer.r[name], layer.scaling[name]) for name in names}) == 1


def _stacked_update(
    layer: LoraLayer, names: Sequence[str | None], inputs: Sequence[Tensor]
) -> Tensor:
    """Equal lengths, ranks and scalings: one batched multiplication per factor, [N, O]."""
    a_GIr = torch.stack([layer.lora_A[name].weight for name in names]).mT
    b_GrO = torch.stack([layer.lora_B[name].weight for name in names]).mT
    x_GLI = torch.stack(list(inputs))
    rank_GLr = torch.bmm(x_GLI, a_GIr) * layer.scaling[names[0]]
    return torch.bmm(rank_GLr, b_GrO).flatten(0, 1)
