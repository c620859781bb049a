"""Memory of a client's and a server's process at a cut: what is held, and when it is most.

It counts; nothing is measured here but the empty process, which comes in as a number.
"""

from dataclasses import dataclass

from cutlayer.model.checkpoint import DTYPES
from cutlayer.model.kv_cache import capacity_for
from cutlayer.model.partition import Cut, Part
from cutlayer.planner.dry_run import Held, PartBytes, count_bytes
from cutlayer.planner.shapes import ModelShapes
from cutlayer.planner.traffic import tensor_bytes
from cutlayer.planner.workload import Workload

__all__ = ["MemoryModel", "MemoryUse"]

_MOMENTS = 2
"""AdamW keeps two values per weight."""
_SAVED_COPIES = 5
"""A save: a copy of the adapter, it and its moments as bytes, and those of a file once more."""
_FRAGMENTS = 1.9
"""torch asks glibc for aligned memory, and what is freed then seldom fits the next request of its
size: a heap that holds 120 MB at its most takes 230 MB (docs/planner.md)."""
_FIRST_USE_BYTES = 25_000_000
"""What gRPC, TLS and the matrix library take with the first real call."""


@dataclass(frozen=True, kw_only=True)
class MemoryUse:
    """Bytes of one process, by what they are; the total is that of the worst moment."""

    baseline: int
    """Python, libraries and what they allocate at first use."""
    weights: int
    """Frozen weights of the parts; a tied embedding once."""
    adapter: int
    gradients: int
    """Of the adapter, summed over micro-batches."""
    moments: int
    """AdamW's."""
    activations: int
    """Graphs in flight, logits and loss, and what computing needs."""
    frames: int
    """Hidden states and gradients on their way."""
    cache: int
    """Keys and values of generation."""
    training: int
    """All of it while training, at its most."""
    generation: int
    """All of it while generating, at its most; the two are processes of their own."""

    @property
    def total(self) -> int:
        """What the machine must have."""
        return max(self.training, self.generation)


class MemoryModel:
    """Predicts both sides at any cut of one model."""

    def __init__(self, shapes: ModelShapes, workload: Workload, baseline_bytes: int) -> None:
        """Run through fake parts once.

        Args:
            shapes: of the model.
            workload: rows, formats and adapter.
            baseline_bytes: of a process without any part.
        """
        self._shapes, self._workload = shapes, workload
        self._baseline = baseline_bytes
        dtype, lengths = DTYPES[workload.dtype], workload.largest_lengths
        prompt = min(workload.prompt_tokens, workload.prefill_tokens)
        self._tokens = sum(lengths)
        self._parts: PartBytes = count_bytes(
            shapes.config,
            workload.adapter,
            dtype,
            lengths,
            workload.num_scored(self._tokens - len(lengths)),
            (prompt,),
        )
        trained = workload.adapter.parts
        self._head_trains, self._tail_trains = Part.HEAD in trained, Part.TAIL in trained
        self._trunk_trains = Part.TRUNK in trained
        self._live = min(len(workload.micro_batches), 2 * workload.in_flight - 1)
        self._hidden = 4 * self._tokens * shapes.hidden_size
        shape = (self._tokens, shapes.hidden_size)
        self._coded = tensor_bytes(shape, workload.codec, workload.dtype)

    def client(self, cut: Cut) -> MemoryUse:
        """The data owner's process."""
        shapes = self._shapes
        head, tail = range(cut.lower), range(cut.upper, shapes.num_blocks)
        ends = shapes.embedding_bytes + shapes.norm_bytes + shapes.lm_head_bytes
        weights = ends + shapes.blocks_bytes(head) + shapes.blocks_bytes(tail)
        adapter = shapes.adapter_bytes(head) * self._head_trains
        adapter += shapes.adapter_bytes(tail) * self._tail_trains
        activations = self._client_activations(len(head), len(tail))
        frames = 2 * self._hidden + 2 * (self._live + 1) * self._coded
        prefill = _resident(
            self._parts.prefill_head_peak.at(len(head)).most(
                self._parts.prefill_tail_peak.at(len(tail))
            )
        )
        load = max(weights, 2 * shapes.largest_tensor_bytes)
        return self._use(
            weights, adapter, activations, frames, len(head) + len(tail), prefill, load
        )

    def server(self, cut: Cut) -> MemoryUse:
        """The trunk server's process, for this one client."""
        shapes, blocks = self._shapes, range(cut.lower, cut.upper)
        weights = shapes.blocks_bytes(blocks)
        adapter = shapes.adapter_bytes(blocks) * self._trunk_trains
        kept = self._parts.trunk_kept.at(len(blocks))
        peak = kept.times(self._live - 1) + self._parts.trunk_peak.at(len(blocks))
        activations = _resident(peak)
        frames = (2 * self._live + 2) * (self._hidden + self._coded)
        prefill = _resident(self._parts.prefill_head_peak.at(len(blocks)))
        return self._use(weights, adapter, activations, frames, len(blocks), prefill, weights)

    def _client_activations(self, num_head: int, num_tail: int) -> int:
        """The most of three moments: a head forward, a tail, a head backward, graphs waiting."""
        parts = self._parts
        if self._head_trains and num_head:
            kept = parts.head_kept.at(num_head)
            forward = parts.head_forward_peak.at(num_head)
            backward = parts.head_backward_peak.at(num_head)
        else:
            kept, backward = Held(self._hidden, 0), Held(0, 0)
            forward = parts.frozen_head_peak.at(num_head)
        waiting = kept.times(self._live - 1)
        tail = waiting + kept + parts.tail_peak.at(num_tail)
        return _resident((waiting + forward.most(backward)).most(tail))

    def _use(
        self,
        weights: int,
        adapter: int,
        activations: int,
        frames: int,
        num_blocks: int,
        prefill: int,
        load: int,
    ) -> MemoryUse:
        moments = _MOMENTS * adapter
        step = _FIRST_USE_BYTES + weights + 2 * adapter + moments + activations + frames
        save = weights + adapter + moments + _SAVED_COPIES * adapter
        cache = self._cache_bytes(num_blocks)
        return MemoryUse(
            baseline=self._baseline,
            weights=weights,
            adapter=adapter,
            gradients=adapter,
            moments=moments,
            activations=activations,
            frames=frames,
            cache=cache,
            training=self._baseline + max(load, step, save),
            generation=self._baseline
            + max(load, _FIRST_USE_BYTES + weights + adapter + moments + cache + prefill),
        )

    def _cache_bytes(self, num_blocks: int) -> int:
        workload = self._workload
        length = workload.prompt_tokens + workload.new_tokens
        tokens = workload.streams * capacity_for(length, max(length, 1))
        return tokens * self._parts.kv_bytes_per_token * num_blocks


def _resident(held: Held) -> int:
    """What a process keeps that has held so much: small storages stay, in pieces."""
    return round(_FRAGMENTS * held.small) + held.large
