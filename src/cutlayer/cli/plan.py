"""`cutlayer plan`: which cut fits a task, a machine and a link. The work is in `planner`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cutlayer.cli.options import JsonOption, SetOption
from cutlayer.cli.output import Output

if TYPE_CHECKING:
    from cutlayer.planner.make import Sources
    from cutlayer.planner.probe import ProbeBudget
    from cutlayer.planner.report import PlanResult

__all__ = ["plan"]

_NEAR = 2.0
"""A limit further off than this many times the most that a cut takes would squeeze the picture."""

ModelArgument = Annotated[
    str,
    typer.Argument(metavar="MODEL|FILE", help="Model folder, GGUF file, hub id or client.toml."),
]
_ClientTrain = Annotated[
    float | None, typer.Option(help="Client: s per block and 1,000 training tokens.")
]
_ClientPrefill = Annotated[
    float | None, typer.Option(help="Client: s per block and 1,000 prompt tokens.")
]
_ClientDecode = Annotated[float | None, typer.Option(help="Client: s per block and token.")]
_ServerTrain = Annotated[
    float | None, typer.Option(help="Server: s per block and 1,000 training tokens.")
]
_ServerPrefill = Annotated[
    float | None, typer.Option(help="Server: s per block and 1,000 prompt tokens.")
]
_ServerDecode = Annotated[float | None, typer.Option(help="Server: s per block and token.")]
_Gigabytes = Annotated[float | None, typer.Option(metavar="GB", help="Memory of this side, in GB.")]
_Baseline = Annotated[
    float | None, typer.Option(metavar="GB", help="Memory of a client process without a model.")
]
_Blocks = Annotated[
    str | None, typer.Option(metavar="LOWER:UPPER", help="Blocks that the server holds.")
]
_Audits = Annotated[
    list[Path] | None,
    typer.Option("--audit", metavar="FILE", help="Results of `cutlayer audit`; repeat."),
]
_Rows = Annotated[
    Path | None, typer.Option("--probe", metavar="FILE", help="Fine-tune briefly on these rows.")
]
_ProbeSeconds = Annotated[
    float | None, typer.Option("--probe-seconds", help="Time for the probe in all.")
]
_SaveNumbers = Annotated[
    Path | None, typer.Option(metavar="FILE", help="Keep the measurements, to plan elsewhere.")
]
_Numbers = Annotated[
    Path | None, typer.Option(metavar="FILE", help="Take measurements instead of measuring.")
]
_Measure = Annotated[bool, typer.Option("--measure/--no-measure", help="Time this machine.")]
_Picture = Annotated[
    Path | None, typer.Option(metavar="FILE", help="Draw memory against seconds (PNG or SVG).")
]


def plan(
    model: ModelArgument,
    set_: SetOption = None,
    client_memory: _Gigabytes = None,
    server_memory: _Gigabytes = None,
    baseline_memory: _Baseline = None,
    client_train_s: _ClientTrain = None,
    client_prefill_s: _ClientPrefill = None,
    client_decode_s: _ClientDecode = None,
    server_train_s: _ServerTrain = None,
    server_prefill_s: _ServerPrefill = None,
    server_decode_s: _ServerDecode = None,
    rtt_ms: Annotated[float | None, typer.Option(help="Round trip of the link.")] = None,
    mbit_per_s: Annotated[float | None, typer.Option(help="Rate of the link.")] = None,
    server_blocks: _Blocks = None,
    workload: Annotated[
        list[str] | None,
        typer.Option("--work", metavar="NAME=VALUE", help="What is planned for; docs/planner.md."),
    ] = None,
    audit: _Audits = None,
    probe: _Rows = None,
    probe_seconds: _ProbeSeconds = None,
    probe_steps: Annotated[int, typer.Option(help="Optimizer steps of the probe at a cut.")] = 20,
    probe_seeds: Annotated[int, typer.Option(help="Fine-tunes of the probe at a cut.")] = 1,
    measure: _Measure = True,
    measurements: _Numbers = None,
    save_measurements: _SaveNumbers = None,
    budget_s: Annotated[float, typer.Option(help="Seconds of each measurement, roughly.")] = 2.0,
    picture: _Picture = None,
    shows_all: Annotated[bool, typer.Option("--all", help="Show every cut.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Predict memory, seconds, bytes and leak of every cut, and recommend one per goal."""
    from cutlayer.planner.inputs import Given, SideSeconds
    from cutlayer.planner.make import Sources, client_of, make_plan

    given = Given(
        client=SideSeconds(
            train_s=client_train_s, prefill_s=client_prefill_s, decode_s=client_decode_s
        ),
        server=SideSeconds(
            train_s=server_train_s, prefill_s=server_prefill_s, decode_s=server_decode_s
        ),
        client_memory_gb=client_memory,
        server_memory_gb=server_memory,
        baseline_memory_gb=baseline_memory,
        rtt_ms=rtt_ms,
        mbit_per_s=mbit_per_s,
    )
    sources = Sources(
        model=model,
        overrides=tuple(set_ or ()),
        workload=tuple(workload or ()),
        server_blocks=server_blocks,
        audits=tuple(audit or ()),
        measures=measure,
        measurements=measurements,
        save_measurements=save_measurements,
        budget_s=budget_s,
    )
    out = Output(as_json)
    _check_picture(picture)
    if probe is not None:
        from cutlayer.planner.probe import ProbeBudget

        client_of(sources)
        budget = ProbeBudget(steps=probe_steps, seconds=probe_seconds, seeds=probe_seeds)
    result = make_plan(sources, given, out.say)
    values = _print(result, out, shows_all)
    if probe is not None:
        values["probe"] = _probe(sources, result, probe, budget, out)
    if picture is not None:
        _draw(result, picture)
        out.say(f"picture: {picture}")
    out.result({**values, "picture": picture})


def _check_picture(path: Path | None) -> None:
    """Minutes of measuring must not end at a package or a folder that is not there."""
    from cutlayer.errors import ConfigError
    from cutlayer.planner.picture import require_pictures

    if path is None:
        return
    require_pictures()
    if not path.absolute().parent.is_dir():
        raise ConfigError(f"cannot draw {path}; name a file in a folder that exists")


def _print(result: "PlanResult", out: Output, shows_all: bool) -> dict[str, object]:
    from cutlayer.planner.report import (
        COLUMNS,
        LEGEND,
        cut_rows,
        input_rows,
        plan_values,
        refused_rows,
    )

    shapes = result.shapes
    out.say(f"{result.model}: {shapes.num_blocks} blocks of width {shapes.hidden_size}")
    out.table(("input", "value", "from"), input_rows(result), title="what the plan rests on")
    title = f"{len(result.feasible)} feasible cuts; seconds and MB per 1,000 tokens"
    out.table(COLUMNS, cut_rows(result, shows_all), title=title)
    out.say(LEGEND)
    refused = refused_rows(result, shows_all)
    if refused:
        out.table(("", "why not"), refused, title="cuts that cannot be")
    for choice in result.choices:
        cut = choice.plan.cut
        out.say(f"{choice.goal}: {cut.lower}:{cut.upper}. {choice.reason}")
    for note in result.notes:
        out.say(f"note: {note}")
    return plan_values(result)


def _probe(
    sources: "Sources", result: "PlanResult", rows: Path, budget: "ProbeBudget", out: Output
) -> dict[str, object]:
    from cutlayer.planner.make import client_of
    from cutlayer.planner.probe import probe, sensitivity

    cuts = list(dict.fromkeys(choice.plan.cut for choice in result.choices))
    found = probe(client_of(sources), rows, cuts, budget, out.say)
    told = sensitivity(found)
    table = [
        (
            f"{one.cut.lower}:{one.cut.upper}",
            f"{one.untuned_loss:.4f}",
            f"{one.loss:.4f}",
            str(one.num_steps),
            f"{one.seconds:.1f}",
        )
        for one in found
    ]
    out.table(("cut", "loss before", "after", "steps", "s"), table, title="probe")
    out.say(told.sentence)
    return {
        "cuts": [
            {
                "lower": one.cut.lower,
                "upper": one.cut.upper,
                "untuned_loss": one.untuned_loss,
                "losses": list(one.losses),
                "steps": one.num_steps,
            }
            for one in found
        ],
        "needed": [told.needed.cut.lower, told.needed.cut.upper],
        "sentence": told.sentence,
    }


def _draw(result: "PlanResult", path: Path) -> None:
    from cutlayer.planner.picture import Point, write_picture

    front = {plan.cut for plan in result.front}
    points = [
        Point(
            cut=plan.cut,
            memory_bytes=plan.client.total,
            seconds=plan.seconds.training,
            leak=None if plan.leak is None else plan.leak.recovery,
            is_leak_exact=plan.leak is None or not plan.leak.note,
            is_front=plan.cut in front,
            is_feasible=plan.refusal is None,
            labels=tuple(str(c.goal) for c in result.choices if c.plan.cut == plan.cut),
        )
        for plan in result.plans
        if plan.seconds.training is not None
    ]
    limit = result.numbers.client_memory
    most = max((point.memory_bytes for point in points), default=0.0)
    is_near = limit is not None and limit.num_bytes < _NEAR * most
    write_picture(
        points,
        path,
        title=f"cuts of {Path(result.model).name}",
        memory_limit_bytes=limit.num_bytes if limit is not None and is_near else None,
    )
