"""A plan as rows of a table and as values for JSON. It decides nothing and does not print."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass

from cutlayer.planner.measurements import BlockSpeed, Measurements
from cutlayer.planner.plan import CutPlan
from cutlayer.planner.recommend import Choice, Goal
from cutlayer.planner.shapes import ModelShapes
from cutlayer.planner.workload import Workload

__all__ = [
    "COLUMNS",
    "LEGEND",
    "PlanResult",
    "cut_rows",
    "input_rows",
    "plan_values",
    "refused_rows",
]

COLUMNS = (
    "cut",
    "client GB",
    "server GB",
    "train s",
    "prefill s",
    "decode s",
    "MB up, down",
    "leak",
    "",
)
_UNKNOWN = "unknown"
_MARKS = {Goal.FASTEST: "F", Goal.MOST_PRIVATE: "P", Goal.LEAST_MEMORY: "M", Goal.BALANCED: "B"}
LEGEND = "* no other cut is better in all; F fastest, P most private, M least memory, B balanced"


@dataclass(frozen=True, kw_only=True)
class PlanResult:
    """A whole plan."""

    model: str
    """As the user calls it."""
    shapes: ModelShapes
    workload: Workload
    rows_source: str
    """Where the numbers of rows come from."""
    numbers: Measurements
    served: range
    served_source: str
    """Where the server's blocks come from."""
    plans: Sequence[CutPlan]
    """All cuts."""
    feasible: Sequence[CutPlan]
    front: Sequence[CutPlan]
    choices: Sequence[Choice]
    notes: Sequence[str]
    """What a reader must know."""


def cut_rows(result: PlanResult, shows_all: bool) -> list[tuple[str, ...]]:
    """One row per cut of the Pareto front and per recommended one, or per feasible cut."""
    chosen = {choice.plan.cut for choice in result.choices}
    front = {plan.cut for plan in result.front}
    found = []
    for plan in result.feasible:
        if shows_all or plan.cut in chosen | front:
            marks = "".join(
                _MARKS[choice.goal] for choice in result.choices if choice.plan.cut == plan.cut
            )
            found.append((*_cells(plan), marks + ("*" if plan.cut in front else "")))
    return found


def _cells(plan: CutPlan) -> tuple[str, ...]:
    crossing = plan.training_bytes
    return (
        f"{plan.cut.lower}:{plan.cut.upper}",
        f"{plan.client.total / 1e9:.2f}",
        f"{plan.server.total / 1e9:.2f}",
        _number(plan.seconds.training),
        _number(plan.seconds.prefill),
        _number(plan.seconds.decode),
        f"{crossing.up / 1e6:.2f}, {crossing.down / 1e6:.2f}",
        "-" if plan.leak is None else plan.leak.text,
    )


def refused_rows(result: PlanResult, shows_all: bool) -> list[tuple[str, str]]:
    """Cuts that cannot be and why: each, or how many there are per reason."""
    refused = [(plan.cut, plan.refusal) for plan in result.plans if plan.refusal is not None]
    if shows_all:
        return [(f"{cut.lower}:{cut.upper}", why) for cut, why in refused]
    reasons: dict[str, int] = {}
    for _, why in refused:
        reasons[why] = reasons.get(why, 0) + 1
    return [(f"{count} cuts", why) for why, count in reasons.items()]


def input_rows(result: PlanResult) -> list[tuple[str, str, str]]:
    """What the plan rests on: name, value, where it comes from."""
    numbers, workload = result.numbers, result.workload
    ends = numbers.ends
    link = "unknown" if numbers.link is None else _link_text(numbers)
    rows = "" if workload.rows is None else f"{workload.rows} rows, "
    limits = {"client memory": numbers.client_memory, "server memory": numbers.server_memory}
    return [
        ("client, s per block", _speed_text(numbers.client), numbers.client_source),
        (
            "client's ends, s",
            _UNKNOWN if ends is None else _ends_text(numbers),
            numbers.ends_source,
        ),
        ("server, s per block", _speed_text(numbers.server), numbers.server_source),
        ("link", link, numbers.link_source),
        *(
            (name, _UNKNOWN, "no limit is checked")
            if limit is None
            else (name, f"{limit.num_bytes / 1e9:.2f} GB", limit.source)
            for name, limit in limits.items()
        ),
        (
            "process without a model",
            _UNKNOWN if numbers.baseline is None else f"{numbers.baseline.num_bytes / 1e9:.2f} GB",
            "unknown" if numbers.baseline is None else numbers.baseline.source,
        ),
        (
            "server's blocks",
            f"{result.served.start} to {result.served.stop - 1}",
            result.served_source,
        ),
        (
            "rows",
            f"{rows}{workload.mean_length} tokens (longest {workload.longest}), "
            f"{workload.scored_share:.0%} scored",
            result.rows_source,
        ),
        (
            "step",
            f"{workload.rows_per_step} rows in {len(workload.micro_batches)} micro-batches, "
            f"{workload.in_flight} in flight; {workload.codec}, {workload.dtype}",
            "settings",
        ),
        (
            "generation",
            f"{workload.prompt_tokens} + {workload.new_tokens} tokens, {workload.streams} streams",
            "settings",
        ),
    ]


def plan_values(result: PlanResult) -> dict[str, object]:
    """The whole plan for JSON."""
    front = {plan.cut for plan in result.front}
    shapes = result.shapes
    return {
        "model": result.model,
        "num_blocks": shapes.num_blocks,
        "hidden_size": shapes.hidden_size,
        "is_tied": shapes.is_tied,
        "workload": result.workload.model_dump(mode="json"),
        "rows_source": result.rows_source,
        "measurements": result.numbers.model_dump(mode="json"),
        "server_blocks": [result.served.start, result.served.stop],
        "cuts": [_values(plan, plan.cut in front) for plan in result.plans],
        "recommended": [
            {
                "goal": str(choice.goal),
                "lower": choice.plan.cut.lower,
                "upper": choice.plan.cut.upper,
                "reason": choice.reason,
            }
            for choice in result.choices
        ],
        "notes": list(result.notes),
    }


def _values(plan: CutPlan, is_front: bool) -> dict[str, object]:
    leak = plan.leak
    return {
        "lower": plan.cut.lower,
        "upper": plan.cut.upper,
        "feasible": plan.refusal is None,
        "refusal": plan.refusal,
        "pareto": is_front,
        "client_memory_bytes": plan.client.total,
        "client_memory": asdict(plan.client),
        "server_memory_bytes": plan.server.total,
        "server_memory": asdict(plan.server),
        "training_s_per_1000": plan.seconds.training,
        "prefill_s_per_1000": plan.seconds.prefill,
        "decode_s_per_1000": plan.seconds.decode,
        "training_bytes_per_1000": asdict(plan.training_bytes),
        "prefill_bytes_per_1000": asdict(plan.prefill_bytes),
        "decode_bytes_per_1000": asdict(plan.decode_bytes),
        "leak": None
        if leak is None
        else {"recovery": leak.recovery, "attack": leak.attack, "note": leak.note},
    }


def _number(value: float | None) -> str:
    return _UNKNOWN if value is None else f"{value:.3g}"


def _speed_text(speed: BlockSpeed) -> str:
    if speed.forward_s is None or speed.backward_s is None:
        training = _UNKNOWN
    else:
        training = f"{speed.forward_s:.3g} + {speed.backward_s:.3g}"
    return (
        f"training {training}, prefill {_number(speed.prefill_s)} per 1,000 tokens; "
        f"token {_number(speed.decode_s)}"
    )


def _ends_text(numbers: Measurements) -> str:
    ends = numbers.ends
    assert ends is not None
    return (
        f"training {ends.head_s:.3g} + {ends.tail_s:.3g} per 1,000 tokens, prompt "
        f"{ends.prefill_s:.3g}, token {ends.decode_s:.3g}"
    )


def _link_text(numbers: Measurements) -> str:
    link = numbers.link
    assert link is not None
    rate = "no limit" if link.mbit_per_s is None else f"{link.mbit_per_s:.4g} Mbit/s"
    return f"round trip {1000 * link.rtt_s:.3g} ms, {rate}"
