"""Made-up plans for tests of what chooses among them."""

from dataclasses import dataclass

import pytest

from cutlayer.model.partition import Cut
from cutlayer.planner import memory
from cutlayer.planner.dry_run import PartBytes, count_bytes
from cutlayer.planner.measurements import (
    BlockSpeed,
    EndsSpeed,
    LinkSpeed,
    Measured,
    Measurements,
)
from cutlayer.planner.memory import MemoryUse
from cutlayer.planner.plan import CutPlan
from cutlayer.planner.seconds import Seconds
from cutlayer.planner.traffic import Traffic

__all__ = ["NUMBERS", "FakeLeak", "count_once", "made_up"]

_COUNTED: dict[str, PartBytes] = {}

NUMBERS = Measurements(
    client=BlockSpeed(forward_s=0.2, backward_s=0.3, prefill_s=0.2, decode_s=0.002),
    server=BlockSpeed(forward_s=0.02, backward_s=0.03, prefill_s=0.02, decode_s=0.0002),
    ends=EndsSpeed(head_s=0.01, tail_s=0.5, prefill_s=0.01, decode_s=0.01),
    link=LinkSpeed(rtt_s=0.02, mbit_per_s=100.0),
    baseline=Measured(num_bytes=400_000_000, source="test"),
    client_source="test",
)


@dataclass(frozen=True)
class FakeLeak:
    """An audit's finding."""

    recovery: float
    attack: str = "bisr-b"
    note: str = ""
    text: str = ""


def count_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiny llamas of one size hold the same bytes in every test: count them once."""

    def count(*args: object) -> PartBytes:
        key = repr(args[1:])
        if key not in _COUNTED:
            _COUNTED[key] = count_bytes(*args)  # type: ignore[arg-type]
        return _COUNTED[key]

    monkeypatch.setattr(memory, "count_bytes", count)


def made_up(
    cut: Cut,
    num_blocks: int = 8,
    memory: float = 1.0,
    seconds: float | None = 1.0,
    leak: float | None = None,
) -> CutPlan:
    """A plan of a cut with these numbers, in GB and seconds."""
    total = round(memory * 1e9)
    use = MemoryUse(
        baseline=0, weights=total, adapter=0, gradients=0, moments=0, activations=0, frames=0,
        cache=0, training=total, generation=0,
    )  # fmt: skip
    nothing = Traffic(up=0, down=0)
    return CutPlan(
        cut=cut,
        head_blocks=cut.lower,
        tail_blocks=num_blocks - cut.upper,
        client=use,
        server=use,
        seconds=Seconds(training=seconds, prefill=None, decode=seconds, client_share=None),
        training_bytes=nothing,
        prefill_bytes=nothing,
        decode_bytes=nothing,
        leak=None if leak is None else FakeLeak(leak),
        refusal=None,
    )
