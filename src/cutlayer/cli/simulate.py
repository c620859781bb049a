"""`cutlayer simulate`: a whole federation on one machine. The work is in `simulation`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cutlayer.cli.options import JsonOption, SetOption, TraceOption
from cutlayer.cli.output import Output, format_bytes
from cutlayer.cli.work import stop_on_sigterm, work_folder

if TYPE_CHECKING:
    from cutlayer.simulation.results import OwnerResult, SimulationResult

__all__ = ["print_federation", "simulate"]

FileArgument = Annotated[Path, typer.Argument(metavar="FILE", help="Settings in TOML form.")]
KeepOption = Annotated[
    Path | None,
    typer.Option("--keep", metavar="FOLDER", help="Keep keys, rows, runs and logs here."),
]


def simulate(
    file: FileArgument,
    set_: SetOption = None,
    keep: KeepOption = None,
    trace: TraceOption = None,
    as_json: JsonOption = False,
) -> None:
    """Train a federation's owners together and alone, and compare them on their own rows."""
    from cutlayer.settings import load_settings
    from cutlayer.simulation.run import run_simulation
    from cutlayer.simulation.settings import SimulationSettings

    out = Output(as_json)
    stop_on_sigterm()
    settings = load_settings(SimulationSettings, file, set_ or ())
    with work_folder(keep, "simulate") as folder:
        result = run_simulation(settings, folder, out.say, trace)
    print_federation(result, out)
    if trace is not None:
        out.say(f"timeline: {trace}")
    out.result(result.values())


def print_federation(result: "SimulationResult", out: Output) -> None:
    """The table, and what was seen of each owner."""
    from cutlayer.simulation.results import SimulationResult

    title = f"accuracy on own held-out rows, {result.rounds} rounds of {result.strategy}"
    out.table(SimulationResult.COLUMNS, result.rows(), title=title)
    for owner in result.owners:
        out.say(_traffic(owner))
    out.say(f"updates {result.updates}")
    out.say(f"noise on activations: {result.owners[0].trained_together.guarantee}")
    phases = ", ".join(f"{name} {s:.0f}" for name, s in result.seconds_by_phase.items())
    out.say(f"seconds {result.seconds:.0f} ({phases})")


def _traffic(owner: "OwnerResult") -> str:
    training = owner.trained_together
    return (
        f"{owner.name}: {training.num_tokens} tokens trained together, "
        f"{format_bytes(training.bytes_up)} up, {format_bytes(training.bytes_down)} down"
    )
