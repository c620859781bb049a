"""Bytes that a part holds while it works, counted in a run without numbers.

The part's own code runs on fake tensors, which have shapes and storages but no memory; where an
architecture looks at values on its way, a few real blocks run instead. Weights do not count. It
does not know processes or cuts (`memory`).

Shapes: N = tokens of a micro-batch, D = hidden size, S = scored tokens.
"""

import logging
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import (
    DynamicOutputShapeException,
    FakeTensorMode,
    UnsupportedFakeTensorException,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from transformers import PreTrainedConfig

from cutlayer.model.adapters import AdapterSettings, attach
from cutlayer.model.kv_cache import bytes_per_token
from cutlayer.model.loss import loss_sum_at
from cutlayer.model.partition import Part, PartModule, Tail
from cutlayer.model.rows import Rows
from cutlayer.planner.blank_part import blank_part

__all__ = ["LARGE_BYTES", "Growth", "Held", "PartBytes", "count_bytes"]

LARGE_BYTES = 1 << 25
"""From here on glibc maps every storage by itself (its DEFAULT_MMAP_THRESHOLD_MAX)."""

_NEEDS_VALUES = (
    torch._subclasses.fake_tensor.DataDependentOutputException,
    DynamicOutputShapeException,
    UnsupportedFakeTensorException,
    torch._subclasses.fake_tensor.UnsupportedOperatorException,
    NotImplementedError,
    RuntimeError,
)


@dataclass(frozen=True)
class Held:
    """Bytes that are held at once, apart by what becomes of them when they are freed."""

    small: int
    """Storages that the allocator keeps for the next: once held, they stay the process's."""
    large: int
    """Storages of `LARGE_BYTES` and more, which go back to the system."""

    def __add__(self, other: "Held") -> "Held":
        return Held(self.small + other.small, self.large + other.large)

    def times(self, count: int) -> "Held":
        """So many of them."""
        return Held(count * self.small, count * self.large)

    def most(self, other: "Held") -> "Held":
        """The most of both kinds, whenever each was held."""
        return Held(max(self.small, other.small), max(self.large, other.large))


@dataclass(frozen=True, kw_only=True)
class Growth:
    """Bytes by the number of blocks: exact for 0, a line through 1 and 2 beyond."""

    empty: Held
    first: Held
    per_block: Held

    def at(self, num_blocks: int) -> Held:
        """Bytes of a part of so many blocks."""
        return self.empty if num_blocks == 0 else self.first + self.per_block.times(num_blocks - 1)


@dataclass(frozen=True, kw_only=True)
class PartBytes:
    """What the phases of a micro-batch, and of generation, hold beside the weights."""

    head_forward_peak: Growth
    """While a head that learns computes."""
    head_kept: Growth
    """Its graph, until its gradient comes."""
    head_backward_peak: Growth
    """Its graph and gradients, while it steps back."""
    frozen_head_peak: Growth
    """While a head that does not learn computes."""
    tail_peak: Growth
    """Forward, loss and backward of a tail that learns."""
    trunk_kept: Growth
    """The trunk's graph at the server."""
    trunk_peak: Growth
    """Forward and backward of the trunk."""
    prefill_head_peak: Growth
    prefill_tail_peak: Growth
    kv_bytes_per_token: int
    """Keys and values of one token in one block."""


@dataclass(frozen=True, kw_only=True)
class _Load:
    """What runs through a part."""

    config: PreTrainedConfig
    adapter: AdapterSettings
    dtype: torch.dtype
    rows: Rows
    num_scored: int


def count_bytes(
    config: PreTrainedConfig,
    adapter: AdapterSettings,
    dtype: torch.dtype,
    lengths: Sequence[int],
    num_scored: int,
    prompt_lengths: Sequence[int],
) -> PartBytes:
    """Count what the parts of a model hold while they work.

    Args:
        config: of the whole model.
        adapter: what is trained.
        dtype: compute type.
        lengths: tokens of the rows of a micro-batch.
        num_scored: tokens of it in the loss.
        prompt_lengths: prompt tokens of the rows of one prefill call.
    """
    load = _Load(
        config=config, adapter=adapter, dtype=dtype, rows=Rows(lengths=tuple(lengths)),
        num_scored=num_scored,
    )  # fmt: skip
    prompt = _Load(
        config=config, adapter=adapter, dtype=dtype, rows=Rows(lengths=tuple(prompt_lengths)),
        num_scored=len(prompt_lengths),
    )  # fmt: skip
    head, trunk = (_growths(load, part, _trained) for part in (Part.HEAD, Part.TRUNK))
    (frozen,) = _growths(load, Part.HEAD, _inference_peak)
    (tail,) = _growths(load, Part.TAIL, _tail_peak)
    (prefill_head,) = _growths(prompt, Part.HEAD, _inference_peak)
    (prefill_tail,) = _growths(prompt, Part.TAIL, _tail_inference_peak)
    return PartBytes(
        head_forward_peak=head[0],
        head_kept=head[1],
        head_backward_peak=head[2],
        frozen_head_peak=frozen,
        tail_peak=tail,
        trunk_kept=trunk[1],
        trunk_peak=trunk[2],
        prefill_head_peak=prefill_head,
        prefill_tail_peak=prefill_tail,
        kv_bytes_per_token=_kv_bytes(load),
    )


class _Live(TorchDispatchMode):
    """Bytes of all storages that operations have made and that are still alive."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = Held(0, 0)
        self._known: dict[int, weakref.finalize] = {}  # type: ignore[type-arg]

    def watch(self, tensor: Tensor) -> None:
        """Count a tensor's storage until it is freed."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known:
            return
        num_bytes = storage.nbytes()
        held = Held(0, num_bytes) if num_bytes >= LARGE_BYTES else Held(num_bytes, 0)
        self.now += held
        self.peak = self.peak.most(self.now)
        self._known[key] = weakref.finalize(storage, self._freed, key, held)

    def know(self, tensors: Sequence[Tensor]) -> None:
        """Weights: they never count."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            key = storage._cdata
            self._known[key] = weakref.finalize(storage, self._known.pop, key, None)

    def __torch_dispatch__(
        self,
        func: Callable[..., object],
        types: Sequence[type],
        args: tuple[object, ...] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        found = func(*args, **(kwargs or {}))
        for value in tree_iter(found):
            if isinstance(value, Tensor):
                self.watch(value)
        return found

    def _freed(self, key: int, held: Held) -> None:
        self._known.pop(key, None)
        self.now += held.times(-1)


Count = Callable[[PartModule, _Load, _Live], tuple[Held, ...]]


def _growths(load: _Load, part: Part, count: Count) -> list[Growth]:
    """Of parts with 0, 1 and 2 blocks, as far as the model has them."""
    most = load.config.num_hidden_layers - (part is not Part.TRUNK)
    least = 1 if part is Part.TRUNK else 0
    found = {size: _counted(load, part, size, count) for size in range(least, min(2, most) + 1)}
    return [_line({size: counts[place] for size, counts in found.items()})
            for place in range(len(found[least]))]  # fmt: skip


def _line(found: Mapping[int, Held]) -> Growth:
    nothing = Held(0, 0)
    empty = found.get(0, nothing)
    first = found.get(1, empty)
    more = found.get(2, first) + first.times(-1)
    return Growth(empty=empty, first=first, per_block=more.most(nothing))


def _counted(load: _Load, part: Part, num_blocks: int, count: Count) -> tuple[Held, ...]:
    # Rows keep what they derive: fake positions must not reach a real run.
    load = replace(load, rows=Rows(lengths=load.rows.lengths))
    try:
        with _quiet(), FakeTensorMode(allow_non_fake_inputs=True):
            return _count_in(load, part, num_blocks, count, seed=None)
    except _NEEDS_VALUES:
        # Experts are chosen by value: only real ones show how much they hold.
        load = replace(load, rows=Rows(lengths=load.rows.lengths))
        return _count_in(load, part, num_blocks, count, seed=0)


@contextmanager
def _quiet() -> Iterator[None]:
    """What fake tensors cannot do is no error here: torch logs it before it raises."""
    log = logging.getLogger("torch._subclasses.fake_tensor")
    before = log.level
    log.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        log.setLevel(before)


def _count_in(
    load: _Load, part: Part, num_blocks: int, count: Count, seed: int | None
) -> tuple[Held, ...]:
    module = blank_part(load.config, part, num_blocks, load.dtype, seed)
    everywhere = load.adapter.model_copy(update={"parts": list(Part)})
    attach(module, everywhere)
    module.train()
    live = _Live()
    live.know([*module.parameters(), *module.buffers()])
    with live:
        return count(module, load, live)


def _input(module: PartModule, load: _Load) -> Tensor:
    return torch.zeros(load.rows.num_tokens, module.hidden_size, dtype=load.dtype)


def _trained(module: PartModule, load: _Load, live: _Live) -> tuple[Held, ...]:
    """The most of a forward, what it leaves for the backward, and the most of that."""
    h_ND = _input(module, load)
    if module.part is not Part.HEAD:
        h_ND.requires_grad_()
    y_ND = module.run_blocks(h_ND, load.rows)
    forward, kept = live.peak, live.now
    gradient_ND = torch.zeros_like(y_ND)
    live.peak = live.now
    if y_ND.requires_grad:
        y_ND.backward(gradient_ND)
    return forward, kept, live.peak + _gradients(module).times(-1)


def _gradients(module: PartModule) -> Held:
    """Counted with the adapter, once, however many micro-batches add to them."""
    found = [p.grad for p in module.parameters() if p.grad is not None]
    return Held(sum(gradient.untyped_storage().nbytes() for gradient in found), 0)


def _tail_peak(module: PartModule, load: _Load, live: _Live) -> tuple[Held, ...]:
    y_ND = _input(module, load).requires_grad_()
    places_S = torch.arange(load.num_scored)
    targets_S = torch.zeros(load.num_scored, dtype=torch.int64)
    loss = loss_sum_at(cast(Tail, module), y_ND, load.rows, places_S, targets_S)
    loss.backward()
    return (live.peak + _gradients(module).times(-1),)


@torch.no_grad()
def _inference_peak(module: PartModule, load: _Load, live: _Live) -> tuple[Held, ...]:
    module.run_blocks(_input(module, load), load.rows)
    return (live.peak,)


@torch.no_grad()
def _tail_inference_peak(module: PartModule, load: _Load, live: _Live) -> tuple[Held, ...]:
    places_S = torch.tensor(load.rows.offsets[1:]) - 1
    cast(Tail, module)(_input(module, load), load.rows, None, places_S)
    return (live.peak,)


def _kv_bytes(load: _Load) -> int:
    def count(module: PartModule, _: _Load, __: _Live) -> tuple[Held, ...]:
        return (Held(bytes_per_token(module, load.dtype), 0),)

    return _counted(load, Part.TRUNK, 1, count)[0].small
