"""All cuts of a model with what is predicted of each: which are feasible, and why others are not.

It chooses nothing (`recommend`), prints nothing (`report`) and measures nothing (`measure`).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from cutlayer.errors import ConfigError
from cutlayer.model.partition import Cut
from cutlayer.planner.measurements import Measurements
from cutlayer.planner.memory import MemoryModel, MemoryUse
from cutlayer.planner.seconds import Seconds, TimeModel
from cutlayer.planner.shapes import ModelShapes
from cutlayer.planner.traffic import Traffic, TrafficModel
from cutlayer.planner.workload import Workload

__all__ = [
    "CutPlan",
    "LeakAt",
    "MeasuredLeak",
    "all_cuts",
    "check_context",
    "feasible",
    "plan_cuts",
]


class MeasuredLeak(Protocol):
    """What an audit found at a cut, or near it."""

    @property
    def recovery(self) -> float:
        """Share of private tokens that the strongest attack recovered, 0 to 1."""

    @property
    def attack(self) -> str:
        """The attack."""

    @property
    def note(self) -> str:
        """Where it was measured, if elsewhere; else empty."""

    @property
    def text(self) -> str:
        """For a table's cell."""


LeakAt = Callable[[Cut], MeasuredLeak | None]
"""None where nothing was audited."""


@dataclass(frozen=True, kw_only=True)
class CutPlan:
    """What is predicted of one cut."""

    cut: Cut
    head_blocks: int
    tail_blocks: int
    client: MemoryUse
    server: MemoryUse
    seconds: Seconds
    training_bytes: Traffic
    """Per 1,000 tokens."""
    prefill_bytes: Traffic
    """Per 1,000 tokens."""
    decode_bytes: Traffic
    """Per 1,000 tokens, over all streams."""
    leak: MeasuredLeak | None
    """None is unknown."""
    refusal: str | None
    """Why it cannot be; None where it can."""

    @property
    def depth(self) -> int:
        """Blocks of the client's thinner end: what is assumed to protect, where no audit says."""
        return min(self.head_blocks, self.tail_blocks)


def all_cuts(num_blocks: int) -> list[Cut]:
    """Every cut that leaves a trunk."""
    return [
        Cut(lower, upper)
        for lower in range(num_blocks)
        for upper in range(lower + 1, num_blocks + 1)
    ]


def plan_cuts(
    shapes: ModelShapes,
    workload: Workload,
    numbers: Measurements,
    served: range,
    leak_at: LeakAt = lambda cut: None,
) -> list[CutPlan]:
    """Predict every cut.

    Args:
        shapes: of the model.
        workload: what is planned for.
        numbers: of the two machines and the link.
        served: blocks that the server holds; a trunk may be any stretch of them.
        leak_at: what audits say.

    Raises:
        ConfigError: the memory of an empty process is not known, or no block is served.
    """
    if numbers.baseline is None:
        raise ConfigError("what an empty client process holds is not known; measure it, or give it")
    if not served or served.start < 0 or served.stop > shapes.num_blocks:
        raise ConfigError(
            f"the server's blocks {served.start}:{served.stop} are no stretch of the model's "
            f"{shapes.num_blocks}; give --server-blocks LOWER:UPPER with 0 <= LOWER < UPPER"
        )
    check_context(shapes, workload)
    memory = MemoryModel(shapes, workload, numbers.baseline.num_bytes)
    times = TimeModel(shapes, workload, numbers)
    traffic = TrafficModel(shapes, workload)
    found = []
    for cut in all_cuts(shapes.num_blocks):
        client, server = memory.client(cut), memory.server(cut)
        found.append(
            CutPlan(
                cut=cut,
                head_blocks=cut.lower,
                tail_blocks=shapes.num_blocks - cut.upper,
                client=client,
                server=server,
                seconds=times.at(cut),
                training_bytes=_per_thousand(traffic.step(cut.lower), workload.tokens_per_step),
                prefill_bytes=_per_thousand(traffic.prompt(), workload.prompt_tokens),
                decode_bytes=_per_thousand(traffic.token(), workload.streams),
                leak=leak_at(cut),
                refusal=_refusal(cut, client, server, numbers, served),
            )
        )
    return found


def feasible(plans: Sequence[CutPlan], numbers: Measurements) -> list[CutPlan]:
    """Those that can be.

    Raises:
        ConfigError: none can; says the least memory that would do.
    """
    found = [plan for plan in plans if plan.refusal is None]
    if found:
        return found
    least = min(plans, key=lambda plan: plan.client.total)
    served = [plan for plan in plans if not _is_out_of_range(plan)]
    smallest = min(served, key=lambda plan: plan.client.total) if served else least
    raise ConfigError(
        f"no cut is feasible: {smallest.refusal}; the least that would do is "
        f"{smallest.client.total / 1e9:.2f} GB at the client, at cut "
        f"{smallest.cut.lower}:{smallest.cut.upper} ({smallest.client.baseline / 1e9:.2f} GB of it "
        f"for a process without a model, {smallest.client.weights / 1e9:.2f} GB weights), with "
        f"{smallest.server.total / 1e9:.2f} GB at the server; fewer rows in a call "
        "(micro_batch_rows) take less"
    )


def _is_out_of_range(plan: CutPlan) -> bool:
    return plan.refusal is not None and plan.refusal.startswith(_RANGE)


_RANGE = "not served"


def _refusal(
    cut: Cut, client: MemoryUse, server: MemoryUse, numbers: Measurements, served: range
) -> str | None:
    if cut.lower < served.start or cut.upper > served.stop:
        return f"{_RANGE}: the server holds blocks {served.start} to {served.stop - 1}"
    limit = numbers.client_memory
    if limit is not None and client.total > limit.num_bytes:
        return f"client memory: more than {limit.num_bytes / 1e9:.2f} GB"
    limit = numbers.server_memory
    if limit is not None and server.total > limit.num_bytes:
        return f"server memory: more than {limit.num_bytes / 1e9:.2f} GB"
    return None


def check_context(shapes: ModelShapes, workload: Workload) -> None:
    """Refuse rows and replies that the model cannot take.

    Raises:
        ConfigError: they are longer than its context.
    """
    context = getattr(shapes.config, "max_position_embeddings", None)
    wanted = max(workload.longest, workload.prompt_tokens + workload.new_tokens)
    if context is not None and wanted + workload.adapter.num_positions > context:
        raise ConfigError(
            f"a row or a reply of {wanted} tokens exceeds the model's context of {context}; give "
            "shorter rows"
        )


def _per_thousand(traffic: Traffic, num_tokens: int) -> Traffic:
    up, down = (round(1000 * count / num_tokens) for count in (traffic.up, traffic.down))
    return Traffic(up=up, down=down)
