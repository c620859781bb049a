"""What one step costs where nothing is computed, and what it sends beside its vectors.

It does not print. Bytes are counted at the socket, by the proxy (`link`).
"""

from dataclasses import dataclass

from benchmarks.report import median
from benchmarks.serving_client import Job, Steps
from benchmarks.serving_world import ServedModel, Worlds

__all__ = ["WireFigures", "measure_wire"]

_WARM_UP = 20
_BYTES_PER_VALUE = {"raw": 4, "bf16": 2}


@dataclass(frozen=True, kw_only=True)
class WireFigures:
    """Of one step of one row, which sends one vector each way."""

    empty_step_ms: float
    """Median from the token at the client to the trunk's answer, connected directly."""
    whole_step_ms: float
    """The same with the tail."""
    overhead_bytes_up: float
    """Per message beyond the vector, at the socket."""
    overhead_bytes_down: float


def measure_wire(
    model: ServedModel, worlds: Worlds, num_steps: int, codec: str = "raw"
) -> WireFigures:
    """Time on a direct connection, bytes through a proxy; one thread a side."""
    steps = Job(steps=Steps(lengths=[1] * num_steps))
    with worlds.open(model, 1) as world:
        run = world.run(steps)
    with worlds.open(model, 1, codec=codec, link="loopback") as world:
        world.set_link("loopback")
        few = Job(steps=Steps(lengths=[1] * 10))
        # The difference of two jobs: what opens and closes a session is in both.
        marks = [world.counters()]
        for job in (few, steps):
            world.run(job)
            marks.append(world.counters())
    extra = (marks[2] - marks[1]) - (marks[1] - marks[0])
    count, vector = num_steps - 10, _BYTES_PER_VALUE[codec] * model.hidden_size
    return WireFigures(
        empty_step_ms=1000 * median(run.trunk_seconds, skip=_WARM_UP),
        whole_step_ms=1000 * median(run.step_seconds, skip=_WARM_UP),
        overhead_bytes_up=extra.bytes_up / count - vector,
        overhead_bytes_down=extra.bytes_down / count - vector,
    )
