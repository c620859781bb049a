"""Whose weights act on which tokens of a part's next call: nobody's, one's, or several's.

It does not make or load weights (`lora`, `prefix`, `sparse`) nor know clients. All kinds of
adapters of one part share one `Slots`, so that they always agree on whose turn it is.
"""

import itertools
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor, nn

from cutlayer.errors import ModelError
from cutlayer.model.adapter_settings import AdapterSettings
from cutlayer.model.partition import PartModule
from cutlayer.model.rows import Rows

__all__ = [
    "DropoutDraws",
    "KindOnPart",
    "Segment",
    "Slots",
    "merged_segments",
    "pieces_of",
    "slots_of",
]

_ATTRIBUTE = "cutlayer_adapters"


class DropoutDraws:
    """The random numbers of one segment's dropout, from the first layer to the last."""

    def __init__(self, seed: int) -> None:
        """Nothing is drawn yet."""
        self._seed = seed
        self._generators: dict[torch.device, torch.Generator] = {}

    def on(self, device: torch.device) -> torch.Generator:
        """The generator of a device, where the last layer left it."""
        if device not in self._generators:
            self._generators[device] = torch.Generator(device=device).manual_seed(self._seed)
        return self._generators[device]


@dataclass(frozen=True, kw_only=True)
class Segment:
    """Neighbouring tokens of the packed order that share an adapter."""

    adapter: str | None
    """Name of the adapter; None is the base model."""
    num_tokens: int
    dropout_seed: int | None = None
    """Seed of the places that the adapter's dropout drops; None drops nothing."""
    draws: "DropoutDraws | None" = None
    """Where the tokens come in several calls, one after another: what the first has begun."""


class KindOnPart(Protocol):
    """All adapters of one kind on one part."""

    def add(
        self, settings: AdapterSettings, name: str, blocks: range
    ) -> Mapping[str, nn.Parameter]:
        """Put fresh weights on blocks of the part; by key, and those that learn want gradients.

        Raises:
            ModelError: the settings do not fit the part.
        """

    def remove(self, name: str) -> None:
        """Take an adapter off, also one that was put on half-way, or that has none of this kind."""

    def use(self, name: str | None) -> None:
        """The part's next calls use this adapter's weights, or nobody's."""

    def share(self, segments: Sequence[Segment] | None) -> None:
        """The part's next call uses each segment's own; None ends that."""


class Slots:
    """All adapters of one part, and whose turn it is.

    Attributes:
        active: the adapter of calls that are not shared; None is the base model.
        segments: of the shared call under way.
        settings: of every adapter on the part, by name.
    """

    def __init__(self) -> None:
        self.active: str | None = None
        self.segments: list[Segment] | None = None
        self.settings: dict[str, AdapterSettings] = {}
        self._kinds: dict[str, KindOnPart] = {}
        self._parameters: dict[str, dict[str, nn.Parameter]] = {}
        self._trained: dict[str, list[nn.Parameter]] = {}

    def put_on(
        self,
        name: str,
        settings: AdapterSettings,
        blocks: range,
        make: Callable[[str], KindOnPart],
    ) -> dict[str, nn.Parameter]:
        """Put an adapter of all its kinds on the part; its weights, sorted by key.

        Args:
            name: of the adapter.
            settings: what it is.
            blocks: global indices of the blocks that get one.
            make: one kind's share of the work on this part, by the kind's name.
        """
        found: dict[str, nn.Parameter] = {}
        for kind in settings.kinds:
            if kind not in self._kinds:
                self._kinds[kind] = make(kind)
            found |= self._kinds[kind].add(settings, name, blocks)
        weights = {key: found[key] for key in sorted(found)}
        self.settings[name], self._parameters[name] = settings, weights
        self._trained[name] = [weight for weight in weights.values() if weight.requires_grad]
        return weights

    def take_off(self, name: str) -> None:
        """Remove an adapter, or what an attempt to put it on has left."""
        if self.active == name:
            self.use(None)
        for kind in self._kinds.values():
            kind.remove(name)
        for table in (self.settings, self._parameters, self._trained):
            table.pop(name, None)

    def freeze(self, part: nn.Module) -> None:
        """Let the adapters' weights learn and nothing else; PEFT freezes the older ones."""
        for parameter in part.parameters():
            parameter.requires_grad_(False)
        for weights in self._trained.values():
            for weight in weights:
                weight.requires_grad_(True)

    def weights(self, name: str) -> dict[str, nn.Parameter]:
        """An adapter's weights by key, sorted; none where there is no such adapter."""
        return dict(self._parameters.get(name, {}))

    def use(self, name: str | None) -> None:
        """Let the next calls use one adapter, or none."""
        if name == self.active:
            return
        self.active = name
        for kind in self._kinds.values():
            kind.use(name)

    @contextmanager
    def shared(self, segments: Sequence[Segment]) -> Iterator[None]:
        """Inside, calls of the part use these adapters; afterwards the one before is active."""
        before, outer = self.active, self.segments
        self.use(None)
        self._share(list(segments))
        try:
            yield
        finally:
            self._share(outer)
            self.use(before)

    def adapters_of(self, rows: Rows) -> list[str | None]:
        """Whose turn it is on each row of a call.

        Raises:
            ModelError: the call has other rows than its segments.
        """
        if self.segments is None:
            return [self.active] * rows.num_rows
        segments = merged_segments(self.segments)
        if len({segment.adapter for segment in segments}) == 1:
            return [segments[0].adapter] * rows.num_rows
        ends = list(itertools.accumulate(segment.num_tokens for segment in segments))
        _check_tokens(rows.num_tokens, ends[-1])
        return [segments[bisect_right(ends, offset)].adapter for offset in rows.offsets[:-1]]

    def _share(self, segments: list[Segment] | None) -> None:
        self.segments = segments
        for kind in self._kinds.values():
            kind.share(segments)


def slots_of(part: PartModule) -> Slots:
    """The slots of a part, which are made when first asked for."""
    slots = vars(part).setdefault(_ATTRIBUTE, Slots())
    assert isinstance(slots, Slots)
    return slots


def merged_segments(segments: Sequence[Segment]) -> list[Segment]:
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


def pieces_of(x_NI: Tensor, segments: Sequence[Segment]) -> Sequence[Tensor]:
    """A layer's inputs, segment by segment.

    Raises:
        ModelError: the layer got other tokens than the call has.
    """
    sizes = [segment.num_tokens for segment in segments]
    _check_tokens(x_NI.shape[0], sum(sizes))
    return list(x_NI.split(sizes))


def _check_tokens(found: int, expected: int) -> None:
    if found != expected:
        raise ModelError(
            f"a layer got {found} of {expected} tokens; rows of several clients cannot share a "
            "call of this architecture: set batch.max_clients=1"
        )
