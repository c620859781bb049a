"""Measures this machine for a plan: blocks, ends, memory. It predicts nothing.

Links are measured in `link_test`.
"""

import platform

import psutil
import torch

from cutlayer.client.recut_sensors import available_bytes
from cutlayer.errors import ConfigError
from cutlayer.model.threads import set_threads
from cutlayer.planner.baseline import measure_baseline
from cutlayer.planner.block_speed import time_blocks
from cutlayer.planner.measurements import BlockSpeed, EndsSpeed, Measured, Measurements
from cutlayer.planner.rehearsal import measured_lengths, measured_prompt, rehearse
from cutlayer.planner.shapes import ModelShapes
from cutlayer.planner.workload import Workload

__all__ = [
    "available_memory",
    "describe_machine",
    "describe_model",
    "describe_work",
    "measure_here",
]

_CACHE_BYTES = 48_000_000
"""Weights that are read one after the other: more than caches hold, as in a whole part."""
_MOST_BLOCKS = 8
_ROOM = 1.5


def measure_here(
    shapes: ModelShapes,
    workload: Workload,
    budget_s: float,
    with_blocks: bool = True,
    with_baseline: bool = True,
) -> Measurements:
    """What this machine does, as a client and, for want of the server's own numbers, as a server.

    Args:
        shapes: of the model.
        workload: rows, formats, threads.
        budget_s: time for repetitions of each measurement, roughly.
        with_blocks: time blocks too; else memory alone.
        with_baseline: start a process without a model, to see what it holds.

    Raises:
        ConfigError: there is no memory for a single block.
    """
    set_threads(workload.threads)
    found = Measurements(
        machine=describe_machine(),
        model=describe_model(shapes),
        work=describe_work(workload),
        client_memory=available_memory(),
    )
    if with_baseline:
        empty = Measured(num_bytes=measure_baseline(workload.threads), source="measured here")
        found = found.model_copy(update={"baseline": empty})
    return _with_speeds(found, shapes, workload, budget_s) if with_blocks else found


def _with_speeds(
    found: Measurements, shapes: ModelShapes, workload: Workload, budget_s: float
) -> Measurements:
    num_blocks = _num_blocks(shapes)
    _check_room(shapes, num_blocks)
    block = time_blocks(shapes.config, workload, num_blocks, budget_s)
    ends = rehearse(shapes.config, workload, 0, budget_s)
    thousands = sum(measured_lengths(workload.usual_lengths)) / 1000
    prompt = measured_prompt(workload) / 1000
    speed = BlockSpeed(
        forward_s=block.forward_s / thousands,
        backward_s=block.backward_s / thousands,
        optimizer_s=block.optimizer_s,
        prefill_s=block.prefill_s / prompt,
        decode_s=block.decode_s,
        codec_s=block.codec_s / thousands,
    )
    count = "1 block" if num_blocks == 1 else f"{num_blocks} blocks"
    source = f"measured here ({count}, {torch.get_num_threads()} threads)"
    changes = {
        "client": speed,
        "client_source": source,
        "server": speed,
        "server_source": f"{source}: as if the server were this machine",
        "ends": EndsSpeed(
            head_s=ends.head_forward_s / thousands,
            tail_s=(ends.tail_s + ends.rest_s) / thousands,
            prefill_s=ends.prefill_s,
            decode_s=ends.decode_s,
        ),
        "ends_source": source,
    }
    return found.model_copy(update=changes)


def available_memory() -> Measured:
    """Memory that a client started now could use: what is free, within the container's limit."""
    free = int(psutil.virtual_memory().available)
    left = available_bytes(of_machine=lambda: free)
    if left is None or left >= free:
        return Measured(num_bytes=free, source="measured here, available now")
    return Measured(num_bytes=left, source="measured here, left of the container's limit")


def describe_machine() -> str:
    """CPU, cores and memory, in words."""
    total = psutil.virtual_memory().total / 1e9
    name = platform.processor() or platform.machine()
    return f"{name}, {psutil.cpu_count()} cores, {total:.0f} GB"


def describe_model(shapes: ModelShapes) -> str:
    """What times of blocks depend on, in words."""
    kind = shapes.config.model_type
    return f"{kind}, {shapes.num_blocks} blocks of width {shapes.hidden_size}, {shapes.dtype}"


def describe_work(workload: Workload) -> str:
    """What times of blocks depend on beside the model, in words."""
    adapter, threads = workload.adapter, workload.threads or "as torch chooses"
    kinds = " and ".join(adapter.kinds)
    return f"{kinds} of rank {adapter.rank}, {workload.streams} streams, threads {threads}"


def _num_blocks(shapes: ModelShapes) -> int:
    usual = sum(shapes.block_bytes) // shapes.num_blocks
    return max(1, min(_MOST_BLOCKS, shapes.num_blocks, -(-_CACHE_BYTES // max(1, usual))))


def _check_room(shapes: ModelShapes, num_blocks: int) -> None:
    ends = shapes.embedding_bytes + shapes.lm_head_bytes + shapes.norm_bytes
    blocks = num_blocks * max(shapes.block_bytes)
    # One after the other, never together.
    needed = round(_ROOM * max(blocks, ends))
    free = available_memory().num_bytes
    if needed > free:
        raise ConfigError(
            f"measuring needs {needed / 1e9:.1f} GB for {num_blocks} blocks or the model's ends, "
            f"{free / 1e9:.1f} GB are available; measure on a machine that has them and bring the "
            "numbers with --measurements, or give seconds per block and --no-measure"
        )
