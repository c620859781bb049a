"""`cutlayer audit`: attack one's own setting before a row leaves. The work is in `audit`."""

import importlib
import importlib.util
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from cutlayer.cli.options import JsonOption, SetOption
from cutlayer.cli.output import Output
from cutlayer.cli.work import stop_on_sigterm
from cutlayer.errors import ConfigError

if TYPE_CHECKING:
    from cutlayer.audit.audit import Outcome
    from cutlayer.audit.results import Trial
    from cutlayer.audit.search import Answer, Tried

__all__ = ["app", "audit"]

app = typer.Typer(
    invoke_without_command=True,
    help="Attack your own setting, and say in plain words what an attacker recovers.",
)

AuditFileOption = Annotated[
    Path | None, typer.Option("--config", "-c", metavar="FILE", help="Settings in TOML form.")
]
OutputOption = Annotated[
    Path | None,
    typer.Option("--output", metavar="FOLDER", help="Another place for audit.folder."),
]
SearchOption = Annotated[
    bool, typer.Option("--search", help="Look for the best setting instead of trying the grid.")
]
TargetOption = Annotated[
    float,
    typer.Option("--target-recovery", metavar="SHARE", help="With --search: accepted recovery."),
]
_COLUMNS = ("setting", "recovered", "prior", "score", "perplexity")


@app.callback()
def audit(
    context: typer.Context,
    config: AuditFileOption = None,
    output: OutputOption = None,
    set_: SetOption = None,
    search: SearchOption = False,
    target_recovery: TargetOption = 0.1,
    as_json: JsonOption = False,
) -> None:
    """Record short runs on the owner's own rows, attack them, and write a report.

    Everything happens on this machine; started again, it goes on from what is done.
    """
    if context.invoked_subcommand is not None:
        return
    if config is None:
        raise ConfigError("cutlayer audit needs --config FILE; examples/audit.toml is one")
    from cutlayer.audit.audit import Audit
    from cutlayer.audit.settings import AuditSettings
    from cutlayer.settings import load_settings

    out = Output(as_json)
    stop_on_sigterm()
    overrides = [*(set_ or ()), *([] if output is None else [f"audit.folder={output}"])]
    plan = load_settings(AuditSettings, config, overrides).audit
    with _Shown() as shown:
        prepared = Audit(plan, shown)
        outcome = prepared.search(target_recovery) if search else prepared.run()
    _print(outcome, out)
    out.result(_values(outcome))


def _register_attack() -> None:
    """`cutlayer audit attack`, which runs one attack on one recording."""
    if importlib.util.find_spec("cutlayer.cli.audit_attack") is not None:
        module = importlib.import_module("cutlayer.cli.audit_attack")
        app.command("attack")(module.attack)


_register_attack()


class _Shown:
    """Progress on stderr: a bar on a terminal, a line a setting elsewhere."""

    def __init__(self) -> None:
        self._console = Console(stderr=True, highlight=False, soft_wrap=True)
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=16),
            TextColumn("{task.percentage:3.0f} %"),
            TimeElapsedColumn(),
            console=self._console,
            disable=not self._console.is_terminal,
        )
        self._task: TaskID = self._bar.add_task("preparing", total=1.0)
        self._title = ""

    def __enter__(self) -> "_Shown":
        self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bar.stop()

    def begin(self, number: int, total: int | None, label: str) -> None:
        """See `Watcher`."""
        self._title = f"{number} of {total}: {label}" if total is not None else f"{number}: {label}"
        if not self._console.is_terminal:
            self._console.print(self._title, markup=False)

    def progress(self, what: str, share: float) -> None:
        """See `Watcher`."""
        self._bar.update(self._task, description=f"{self._title}: {what}", completed=share)

    def finish(self, trial: "Trial", was_done: bool) -> None:
        """See `Watcher`."""
        from cutlayer.audit.verdict import sentence

        note = " (done before)" if was_done else ""
        self._console.print(f"{trial.label}{note}: {sentence(trial)}", markup=False)


def _print(outcome: "Outcome", out: Output) -> None:
    out.table(_COLUMNS, [_row(trial) for trial in outcome.trials])
    if outcome.answer is not None:
        out.say(_answer_text(outcome.answer))
    out.say(f"report: {outcome.files[0]}")


def _row(trial: "Trial") -> tuple[str, ...]:
    worst, utility = trial.worst, trial.utility
    share = None if worst is None else worst.recovery
    accuracy = None if utility is None else utility.accuracy
    perplexity = None if utility is None else utility.perplexity
    return (
        trial.label,
        "-" if share is None else f"{100 * share.value:.1f} %",
        "-" if trial.prior is None else f"{100 * trial.prior:.1f} %",
        "-" if accuracy is None else f"{accuracy:.3f}",
        "-" if perplexity is None else f"{perplexity:.4g}",
    )


def _answer_text(answer: "Answer") -> str:
    num, limit = len(answer.tried), " (the limit)" if answer.is_exhausted else ""
    if answer.best is not None:
        return (
            f"best of {num} settings{limit} at {answer.target:.0%} recovery or less: "
            f"{_tried_text(answer.best)}"
        )
    least = "" if answer.nearest is None else f"; the least was {_tried_text(answer.nearest)}"
    return f"none of {num} settings{limit} keeps recovery at {answer.target:.0%} or less{least}"


def _tried_text(tried: "Tried") -> str:
    recovery = "unknown" if tried.recovery is None else f"{tried.recovery:.1%}"
    utility = "unknown" if tried.utility is None else f"{tried.utility:.3f}"
    return f"{tried.spec.label} (recovery {recovery}, utility {utility})"


def _values(outcome: "Outcome") -> dict[str, object]:
    import msgspec

    from cutlayer.audit.results import without_examples
    from cutlayer.audit.verdict import grade_of, sentence

    trials = [
        {
            **msgspec.to_builtins(without_examples(trial)),
            "verdict": sentence(trial),
            "grade": str(grade_of(trial.recovery)),
            "recovery": trial.recovery,
        }
        for trial in outcome.trials
    ]
    answer = None if outcome.answer is None else msgspec.to_builtins(outcome.answer)
    return {"trials": trials, "files": [str(path) for path in outcome.files], "search": answer}
