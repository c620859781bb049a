"""Whose LoRA weights act on which tokens of a part's next call: nobody's, one's, or several's.

It does not make, load or remove weights (`adapters`) nor know clients. The base layers see all
tokens in one multiplication; each segment adds the update of its own adapter, and only that
adapter's weights are in its graph: values of one segment cannot reach another's gradients.

Shapes: N = tokens of the call, I and O = input and output features, r = rank, G = segments of
equal length, L = that length.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from cutlayer.errors import ModelError
from cutlayer.model.families import rotates_by_batch
from cutlayer.model.partition import PartModule

__all__ = ["Segment", "Slots", "can_share_calls"]

_RANDOM = ("drop", "jitter", "noise")
"""What modules call the strength of random numbers that they draw in training."""


@dataclass(frozen=True, kw_only=True)
class Segment:
    """Neighbouring tokens of the packed order that share an adapter."""

    adapter: str | None
    """Name of the adapter; None is the base model."""
    num_tokens: int
    dropout_seed: int | None = None
    """Seed of the places that the adapter's dropout drops; None drops nothing."""


@dataclass
class Slots:
    """All LoRA layers of one part, and whose adapter is in use on them."""

    layers: list[LoraLayer] = field(default_factory=list)
    active: str | None = None
    trains_a: dict[str, bool] = field(default_factory=dict)
    """Every adapter on the part, and whether its factor A is trained."""
    _call: "_SegmentedCall | None" = None
    _hooked: set[int] = field(default_factory=set)

    def use(self, name: str | None) -> None:
        """Let PEFT's own forward use one adapter, or none."""
        if name == self.active:
            return
        self.active = name
        for layer in self.layers:
            # PEFT's set_adapter also takes requires_grad from the others: a graph that was built
            # for one of them would then lose its gradient without an error.
            layer._active_adapter = [] if name is None else [name]

    @contextmanager
    def segments(self, segments: Sequence[Segment]) -> Iterator[None]:
        """Inside, calls of the part use these adapters; afterwards the one before is active."""
        before = self.active
        self._hook_layers()
        self.use(None)
        self._call = _SegmentedCall(segments)
        try:
            yield
        finally:
            self._call = None
            self.use(before)

    def _hook_layers(self) -> None:
        for layer in self.layers:
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
        self._segments = _merged(segments)
        self._num_tokens = sum(segment.num_tokens for segment in segments)
        self._generators: dict[int, torch.Generator] = {}

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
        if x_NI.shape[0] != self._num_tokens:
            raise ModelError(
                f"a layer got {x_NI.shape[0]} of {self._num_tokens} tokens; rows of several "
                "clients cannot share a call of this architecture: set batch.max_clients=1"
            )
        update_NO = self._grouped(layer, known, x_NI)
        return (output + update_NO.view(output.shape)).to(output.dtype)

    def _grouped(self, layer: LoraLayer, known: Sequence[str | None], x_NI: Tensor) -> Tensor:
        sizes = [segment.num_tokens for segment in self._segments]
        dropped = [self._dropped(layer, i, x_nI) for i, x_nI in enumerate(x_NI.split(sizes))]
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
        if share == 0.0 or segment.dropout_seed is None:
            return x
        if index not in self._generators:
            generator = torch.Generator(device=x.device).manual_seed(segment.dropout_seed)
            self._generators[index] = generator
        # As torch's dropout on the CPU computes it, but from a generator of the segment's own.
        kept = torch.empty_like(x).bernoulli_(1 - share, generator=self._generators[index])
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


def _draws(module: nn.Module) -> bool:
    if isinstance(module, nn.modules.dropout._DropoutNd):
        return module.p > 0
    return any(
        isinstance(value, float) and value > 0 and any(word in name for word in _RANDOM)
        for name, value in vars(module).items()
    )


def _merged(segments: Sequence[Segment]) -> list[Segment]:
    """Neighbours of one adapter become one segment, unless they drop places of their own."""
    merged: list[Segment] = []
    for segment in segments:
        last = merged[-1] if merged else None
        is_same = last is not None and last.adapter == segment.adapter
        if last is not None and is_same and last.dropout_seed is segment.dropout_seed is None:
            merged[-1] = replace(last, num_tokens=last.num_tokens + segment.num_tokens)
        else:
            merged.append(segment)
    return merged


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
