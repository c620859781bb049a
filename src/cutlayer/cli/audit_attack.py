"""`cutlayer audit attack`: one attack on one recording. The work is in `audit.run_attack`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from cutlayer.cli.options import JsonOption
from cutlayer.cli.output import Output

if TYPE_CHECKING:
    from cutlayer.audit.run_attack import AttackRun

__all__ = ["attack"]

RecordingArgument = Annotated[
    Path, typer.Argument(metavar="RECORDING", help="Written by cutlayer train --record.")
]
AttackOption = Annotated[str, typer.Option("--attack", metavar="NAME", help="Which attack.")]
ModelOption = Annotated[
    str, typer.Option("--model", metavar="PATH", help="The public model that was recorded.")
]
TruthOption = Annotated[
    Path | None,
    typer.Option("--truth", metavar="FILE", help="The owner's truth, to score."),
]
PublicOption = Annotated[
    Path | None,
    typer.Option("--public", metavar="FILE", help="Public text of the same kind, a row a line."),
]
AdaptersOption = Annotated[
    Path | None,
    typer.Option(
        "--adapters", metavar="FOLDER", help="Threat T2: head and tail as cutlayer export wrote."
    ),
]
SecondsOption = Annotated[
    float, typer.Option("--seconds", min=0.001, help="Time for the attack; it ends with less.")
]
TruncatedOption = Annotated[
    bool, typer.Option("--truncated", help="Accept a recording without its end.")
]


def attack(
    recording: RecordingArgument,
    attack: AttackOption,
    model: ModelOption,
    truth: TruthOption = None,
    public: PublicOption = None,
    adapters: AdaptersOption = None,
    seconds: SecondsOption = 600.0,
    accepts_truncated: TruncatedOption = False,
    as_json: JsonOption = False,
) -> None:
    """Run one attack on a recording; recovered text is never printed."""
    from cutlayer.audit.attack import Effort
    from cutlayer.audit.run_attack import public_rows, run_attack
    from cutlayer.model.folder import resolve_model

    out = Output(as_json)
    folder = resolve_model(model)
    rows = [] if public is None else public_rows(public, folder)
    with _bar() as bar:
        task = bar.add_task(attack, total=1.0)
        result = run_attack(
            attack,
            recording,
            folder,
            rows,
            truth=truth,
            adapters=adapters,
            effort=Effort(
                seconds=seconds, on_progress=lambda share: bar.update(task, completed=share)
            ),
            accepts_truncated=accepts_truncated,
        )
    _print(result, out)
    out.result(result.values())


def _bar() -> Progress:
    """On stderr, and on a terminal alone."""
    console = Console(stderr=True)
    share = TextColumn("{task.percentage:3.0f} %")
    columns = (TextColumn("{task.description}"), BarColumn(), share)
    return Progress(*columns, console=console, disable=not console.is_terminal)


def _print(result: "AttackRun", out: Output) -> None:
    out.say(f"{result.attack}: {result.about}")
    out.say(f"the attacker knows: {result.threat}, noise {result.rule}")
    score = result.score
    if score is None:
        out.say(f"{len(result.guesses)} observations guessed; --truth FILE scores them")
        return
    if score.had_no_time:
        out.say(f"no time: {score.num_unfinished} positions unfinished; give more --seconds")
        return
    found = score.recovery
    out.say(
        f"recovered {found.value:.1%} of {found.num} (95 % interval {found.low:.1%} to "
        f"{found.high:.1%}); chance {score.chance:.1%} +- {score.chance_error:.1%}"
    )
    if score.num_unfinished:
        out.say(f"{score.num_unfinished} positions unfinished: give more --seconds")
