"""Keep the adapters of a leading rank's trunk on the others: which there are, their weights, whose
turn it is.

It does not send anything (`server.tensor_parallel`). Weights go one way, from the leader, and only
those of adapters in use that changed since they were sent; gradients and optimizers are the
leader's alone.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import msgspec
import torch
from torch import Tensor, nn

from cutlayer.model.adapter_slots import Segment, slots_of
from cutlayer.model.adapters import Adapter, AdapterSettings, attach, base_only, use_segments
from cutlayer.model.partition import Trunk
from cutlayer.settings import parse_settings

__all__ = ["AdapterChange", "AdapterCopies", "AdapterSource", "NewAdapter"]


class NewAdapter(msgspec.Struct, frozen=True, kw_only=True):
    """What `attach` needs to make the same adapter."""

    name: str
    settings: dict[str, object]
    """`AdapterSettings`, as plain values."""


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
    """Watches the adapters of the leader's trunk."""

    def __init__(self, trunk: Trunk) -> None:
        self._slots = slots_of(trunk)
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
            segments=self._slots.segments,
        )
        return change, list(vectors.values())

    def _in_use(self) -> list[str]:
        segments = self._slots.segments
        names = [self._slots.active] if segments is None else [s.adapter for s in segments]
        return list(dict.fromkeys(name for name in names if name is not None))

    def _weights(self, name: str) -> list[nn.Parameter]:
        return list(self._slots.weights(name).values())

    def _is_gone(self, name: str, weights: Sequence[nn.Parameter] | None) -> bool:
        """Whether it was removed; another one may have its name by now."""
        if weights is None:
            return name not in self._slots.settings
        before = self._sent[name]
        if len(weights) != len(before):
            return True
        return any(a is not b for a, b in zip(weights, before, strict=True))

    def _is_stale(self, name: str, value: Tensor) -> bool:
        # By value: a fused optimizer changes weights without counting it as a new version. It
        # costs little, since a call reads far more weights than an adapter has.
        return name not in self._values or not torch.equal(self._values[name], value)

    def _describe(self, name: str) -> NewAdapter:
        settings = self._slots.settings[name]
        return NewAdapter(name=name, settings=settings.model_dump(mode="json"))


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
            settings = parse_settings(AdapterSettings, new.settings, f"adapter {new.name}")
            self._adapters[new.name] = attach(self._trunk, settings, new.name)
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
        weights = slots_of(self._trunk).weights(name).values()
        parts = vector.split([weight.numel() for weight in weights])
        for weight, part in zip(weights, parts, strict=True):
            # Through `data`, as no new version: a graph that other clients share may still be open
            # here, and none of them asks for this adapter's gradient.
            weight.data.copy_(part.view_as(weight))


def _flat(weights: Sequence[nn.Parameter]) -> Tensor:
    return torch.cat([weight.detach().float().flatten() for weight in weights])
