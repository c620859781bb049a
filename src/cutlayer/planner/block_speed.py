"""Blocks at work, timed on this machine with made-up weights. It does not serve or predict."""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from transformers import PreTrainedConfig

from cutlayer.model.adapters import Adapter, attach
from cutlayer.model.checkpoint import DTYPES
from cutlayer.model.kv_cache import RowCache
from cutlayer.model.optimizer import AdamWSettings, PartOptimizer
from cutlayer.model.partition import Part, PartModule
from cutlayer.model.rows import Rows
from cutlayer.planner.blank_part import blank_part
from cutlayer.planner.clock import Laps
from cutlayer.planner.rehearsal import measured_lengths, measured_prompt
from cutlayer.planner.workload import Workload
from cutlayer.wire.codec import decode, encode

__all__ = ["BlockSeconds", "time_blocks"]

_LEAST_REPEATS, _MOST_REPEATS = 3, 15
_DECODE_STEPS = 6


@dataclass(frozen=True, kw_only=True)
class BlockSeconds:
    """Seconds of one block, and for what a trunk does around its blocks."""

    forward_s: float
    """Of one micro-batch."""
    backward_s: float
    optimizer_s: float
    """Of one step's end."""
    prefill_s: float
    """Of one prompt."""
    decode_s: float
    """Of one token of every stream."""
    codec_s: float
    """Decoding and encoding the hidden states of one micro-batch, once each."""


def time_blocks(
    config: PreTrainedConfig, workload: Workload, num_blocks: int, budget_s: float
) -> BlockSeconds:
    """Time so many blocks in a row, more than the caches of the CPU hold, and divide."""
    trunk = blank_part(config, Part.TRUNK, num_blocks, DTYPES[workload.dtype])
    trunk.decode_threads = workload.decode_threads
    everywhere = workload.adapter.model_copy(update={"parts": list(Part)})
    adapter = attach(trunk, everywhere)
    training = _time_training(trunk, adapter, workload, budget_s)
    optimizer_s = _time_optimizer(adapter)
    trunk.eval()
    prefill_s, decode_s = _time_generation(trunk, workload, budget_s / 2)
    return BlockSeconds(
        forward_s=training[0] / num_blocks,
        backward_s=training[1] / num_blocks,
        optimizer_s=optimizer_s / num_blocks,
        prefill_s=prefill_s / num_blocks,
        decode_s=decode_s / num_blocks,
        codec_s=training[2],
    )


def _time_training(
    trunk: PartModule, adapter: Adapter, workload: Workload, budget_s: float
) -> tuple[float, ...]:
    """Forward, backward and codec, for all blocks together."""
    rows = Rows(lengths=measured_lengths(workload.usual_lengths))
    sent = encode(trunk.zeros_ND(rows.num_tokens).float().uniform_(-1, 1), workload.codec)
    watch, like = Laps(), trunk.zeros_ND(1).dtype
    trunk.train()

    def once() -> None:
        with watch.span("block", "decode"):
            h_ND = decode(sent).to(like).requires_grad_()
        with watch.span("block", "forward"):
            y_ND = trunk.run_blocks(h_ND, rows)
        with watch.span("block", "encode"):
            encode(y_ND.detach().float(), workload.codec)
        with watch.span("block", "backward"):
            torch.autograd.grad(y_ND, [*adapter.parameters(), h_ND], torch.ones_like(y_ND))

    _repeat(once, budget_s)
    codec_s = watch.seconds("decode") + watch.seconds("encode")
    return watch.seconds("forward"), watch.seconds("backward"), codec_s


def _time_optimizer(adapter: Adapter) -> float:
    optimizer, watch = PartOptimizer(adapter, AdamWSettings()), Laps()
    for _ in range(1 + _LEAST_REPEATS):
        for parameter in adapter.parameters():
            parameter.grad = torch.zeros_like(parameter)
        with watch.span("block", "step"):
            optimizer.sq_norm()
            optimizer.step(1.0, 1e-4)
    return watch.seconds("step")


@torch.inference_mode()
def _time_generation(trunk: PartModule, workload: Workload, budget_s: float) -> tuple[float, float]:
    prompt, watch = measured_prompt(workload), Laps()
    h_ND = trunk.zeros_ND(max(prompt, workload.streams)).uniform_(-1, 1)

    def once() -> None:
        limit = prompt + _DECODE_STEPS
        caches = [RowCache(len(trunk.block_range), limit) for _ in range(workload.streams)]
        for cache in caches:
            with watch.span("block", "prompt"):
                trunk.run_blocks(h_ND[:prompt], Rows(lengths=(prompt,)), [cache])
        for place in range(_DECODE_STEPS):
            starts = (prompt + place,) * len(caches)
            rows = Rows(lengths=(1,) * len(caches), starts=starts)
            with watch.span("block", "token"):
                trunk.run_blocks(h_ND[: len(caches)], rows, caches)

    _repeat(once, budget_s)
    return watch.seconds("prompt"), watch.seconds("token", skip=_DECODE_STEPS)


def _repeat(once: Callable[[], None], budget_s: float) -> None:
    """At least a few times after one that warms up, then until the time is over."""
    end_s = time.monotonic() + budget_s
    for number in range(1 + _MOST_REPEATS):
        if number > _LEAST_REPEATS and time.monotonic() > end_s:
            return
        once()
