"""Keep the adapters of a leading rank's trunk on the others: which there are, their weights, whose
turn it is.

It does not send anything (`server.tensor_parallel`). Weights go one way, from the leader, and only
those of adapters in use that changed since they were sent; gradients and optimizers are the
leader's alone.
"""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import cast

import msgspec
import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from cutlayer.model import adapters
from cutlayer.model.adapters import Adapter, AdapterSettings, attach, base_only, use_segments
from cutlayer.model.grouped_lora import Segment, Slots
from cutlayer.model.partition import Trunk

__all__ = ["AdapterChange", "AdapterCopies", "AdapterSource", "NewAdapter"]


class NewAdapter(msgspec.Struct, frozen=True, kw_only=True):
    """What `attach` needs to make an adapter of the same shape."""

    name: str
    rank: int
    alpha: float
    dropout: float
    train_a: bool
    targets: list[str]
    """Global paths of the layers."""


class AdapterChange(msgspec.Struct, frozen=True, kw_only=True):
    """What the others have to do before they compute the same call."""

    dropped: list[str]
    added: list[NewAdapter]
    loaded: list[tuple[str, int]]
    """Adapters whose weights follow, and how many values each has."""
    active: str | None
    """The adapter in use for all tokens."""
    segments: list[Segment] | None
    """Or whose turn it is on which tokens."""


class AdapterSource:
    """Watches the adapters of the leader's trunk; make it before the first `attach`."""

    def __init__(self, trunk: Trunk) -> None:
        self._trunk = trunk
        self._slots = _WatchedSlots()
        vars(trunk)[adapters._ATTRIBUTE] = self._slots
        self._sent: dict[str, list[nn.Parameter]] = {}
        self._values: dict[str, Tensor] = {}

    def changes(self) -> tuple[AdapterChange, list[Tensor]]:
        """What to tell for the next call, and the weights of `loaded` as flat float32 vectors."""
        used = {name: found for name in self._in_use() if (found := self._weights(name))}
        dropped = [name for name in self._sent if self._is_gone(name, used.get(name))]
        for name in dropped:
            del self._sent[name], self._values[name]
        added = [self._describe(name) for name in used if name not in self._sent]
        current = {name: _flat(weights) for name, weights in used.items()}
        vectors = {name: value for name, value in current.items() if self._is_stale(name, value)}
        for name, vector in vectors.items():
            self._sent[name], self._values[name] = used[name], vector
        change = AdapterChange(
            dropped=dropped,
            added=added,
            loaded=[(name, vector.numel()) for name, vector in vectors.items()],
            active=self._slots.active,
            segments=self._slots.watched,
        )
        return change, list(vectors.values())

    def _in_use(self) -> list[str]:
        segments = self._slots.watched
        names = [self._slots.active] if segments is None else [s.adapter for s in segments]
        return list(dict.fromkeys(name for name in names if name is not None))

    def _weights(self, name: str) -> list[nn.Parameter]:
        return _weights(self._slots.layers, name)

    def _is_gone(self, name: str, weights: Sequence[nn.Parameter] | None) -> bool:
        """Whether it was removed; another one may have its name by now."""
        if weights is None:
            return name not in self._slots.trains_a
        before = self._sent[name]
        if len(weights) != len(before):
            return True
        return any(a is not b for a, b in zip(weights, before, strict=True))

    def _is_stale(self, name: str, value: Tensor) -> bool:
        # By value: a fused optimizer changes weights without counting it as a new version. It
        # costs little, since a call reads far more weights than an adapter has.
        return name not in self._values or not torch.equal(self._values[name], value)

    def _describe(self, name: str) -> NewAdapter:
        modules = self._trunk.base.named_modules()
        layers = {
            path: module
            for path, module in modules
            if isinstance(module, LoraLayer) and name in module.lora_A
        }
        first = next(iter(layers.values()))
        rank = int(first.r[name])
        return NewAdapter(
            name=name,
            rank=rank,
            alpha=float(first.scaling[name]) * rank,
            dropout=float(getattr(first.lora_dropout[name], "p", 0.0)),
            train_a=self._slots.trains_a[name],
            targets=[self._trunk.global_name(f"base.{path}") for path in layers],
        )


class AdapterCopies:
    """The adapters on another rank's trunk."""

    def __init__(self, trunk: Trunk) -> None:
        self._trunk = trunk
        self._adapters: dict[str, Adapter] = {}

    def apply(self, change: AdapterChange, vectors: Sequence[Tensor]) -> None:
        """Become what the leader's trunk is; `vectors` are the weights of `change.loaded`."""
        for name in change.dropped:
            self._adapters.pop(name).remove()
        for new in change.added:
            self._adapters[new.name] = attach(self._trunk, _settings(new), new.name)
        for (name, _), vector in zip(change.loaded, vectors, strict=True):
            self._load(name, vector)

    def using(self, change: AdapterChange) -> AbstractContextManager[None]:
        """Inside, calls of the trunk use the adapters that the leader uses."""
        if change.segments is not None:
            return use_segments(self._trunk, change.segments)
        if change.active not in self._adapters:
            return base_only(self._trunk)
        self._adapters[change.active].activate()
        return nullcontext()

    def clear_gradients(self) -> None:
        """Forget what backward left: the leader has the sums."""
        for adapter in self._adapters.values():
            for parameter in adapter.parameters():
                parameter.grad = None

    def _load(self, name: str, vector: Tensor) -> None:
        modules = self._trunk.base.modules()
        weights = _weights([m for m in modules if isinstance(m, LoraLayer)], name)
        parts = vector.split([weight.numel() for weight in weights])
        for weight, part in zip(weights, parts, strict=True):
            # Through `data`, as no new version: a graph that other clients share may still be open
            # here, and none of them asks for this adapter's gradient.
            weight.data.copy_(part.view_as(weight))


class _WatchedSlots(Slots):
    """Adapter slots that remember the segments of the call under way."""

    watched: list[Segment] | None = None

    @contextmanager
    def segments(self, segments: Sequence[Segment]) -> Iterator[None]:
        before, self.watched = self.watched, list(segments)
        try:
            with super().segments(segments):
                yield
        finally:
            self.watched = before


def _weights(layers: Sequence[LoraLayer], name: str) -> list[nn.Parameter]:
    """Both factors on every layer, in the order of the trunk's modules."""
    return [
        cast(nn.Parameter, factors[name].weight)
        for layer in layers
        for factors in (layer.lora_A, layer.lora_B)
        if name in factors
    ]


def _flat(weights: Sequence[nn.Parameter]) -> Tensor:
    return torch.cat([weight.detach().float().flatten() for weight in weights])


def _settings(new: NewAdapter) -> AdapterSettings:
    return AdapterSettings(
        rank=new.rank,
        alpha=new.alpha,
        dropout=new.dropout,
        train_a=new.train_a,
        targets=new.targets,
    )
