"""`cutlayer eval`: scores a task file through the split model; its subcommands stand in own files.

The work is in `evaluation`.
"""

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cutlayer.cli import eval_suite, eval_task
from cutlayer.cli.options import JsonOption, SetOption
from cutlayer.cli.output import Output, check_target, format_bytes

if TYPE_CHECKING:
    from cutlayer.evaluation.report import Evaluation

__all__ = ["app", "evaluate"]

app = typer.Typer(
    invoke_without_command=True,
    help="Score a task file through the split model, or make one of a published task.",
)
app.command("task")(eval_task.task)
app.command("score")(eval_task.score)
app.command("suite")(eval_suite.suite)
app.command("report")(eval_suite.report)

_SECONDS_BETWEEN_LINES = 10.0

ConfigFileOption = Annotated[
    Path | None, typer.Option("--config", "-c", metavar="FILE", help="Settings in TOML form.")
]
TasksOption = Annotated[
    Path | None, typer.Option("--tasks", metavar="FILE", help="Items to score, JSON lines.")
]
LimitOption = Annotated[
    int | None, typer.Option("--limit", min=1, metavar="N", help="The first N items alone.")
]
OutOption = Annotated[
    Path | None,
    typer.Option("--out", metavar="FILE", help="Write each item's prediction here (JSON lines)."),
]
SkipOption = Annotated[
    bool, typer.Option("--skip-long", help="Leave out items longer than the model's context.")
]
BatchOption = Annotated[
    int,
    typer.Option(
        "--batch-tokens", min=1, metavar="N", help="Tokens of choices in one call of the trunk."
    ),
]


@app.callback()
def evaluate(
    context: typer.Context,
    config: ConfigFileOption = None,
    tasks: TasksOption = None,
    limit: LimitOption = None,
    out_file: OutOption = None,
    skip_long: SkipOption = False,
    batch_tokens: BatchOption = 1024,
    set_: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Score a task file: choices by log-likelihood, replies by exact match, F1 and ROUGE-L."""
    if context.invoked_subcommand is not None:
        _check_no_option(context)
        return
    # Not typer's own check: subcommands need neither.
    if config is None:
        context.fail("Missing option '--config' / '-c'.")
    if tasks is None:
        context.fail("Missing option '--tasks'.")
    from cutlayer.cli.certificates import warn_of_expiry
    from cutlayer.client.client import Client
    from cutlayer.client.settings import ClientSettings
    from cutlayer.evaluation.report import predictions
    from cutlayer.evaluation.run import EvaluationOptions, evaluate
    from cutlayer.evaluation.tasks import read_items
    from cutlayer.settings import load_settings
    from cutlayer.storage.files import write_atomic

    out = Output(as_json)
    settings = load_settings(ClientSettings, config, set_ or ())
    if out_file is not None:
        check_target(out_file, "predictions")
    items = read_items(tasks, limit)
    warn_of_expiry(settings.connection, out)
    options = EvaluationOptions(max_batch_tokens=batch_tokens, skips_long=skip_long)
    with Client(settings) as client:
        result = evaluate(client, items, options, _Counter(out, len(items)).count)
    if out_file is not None:
        write_atomic(out_file, predictions(result.outcomes))
    _print(result, out)
    out.result({"tasks": str(tasks), **result.values(), "predictions": out_file})


def _check_no_option(context: typer.Context) -> None:
    """What stands before a subcommand would not reach it: `--json` would print a table."""
    for parameter in context.command.params:
        source = context.get_parameter_source(parameter.name or "")
        if source is not None and source.name == "COMMANDLINE":
            context.fail(
                f"{parameter.opts[0]} stands before {context.invoked_subcommand}; write it after"
            )


class _Counter:
    """Says now and then how far it is."""

    def __init__(self, out: Output, num_items: int) -> None:
        self._out, self._num_items = out, num_items
        self._num_done, self._said_s = 0, time.monotonic()

    def count(self) -> None:
        self._num_done += 1
        if time.monotonic() - self._said_s >= _SECONDS_BETWEEN_LINES:
            self._said_s = time.monotonic()
            self._out.errors.print(f"{self._num_done} of {self._num_items} items")


def _print(result: "Evaluation", out: Output) -> None:
    from cutlayer.evaluation.report import summaries

    columns = ("metric", "mean", "standard error", "95 % interval", "items")
    rows = [
        (
            name,
            f"{summary.mean:.4f}",
            "-" if summary.standard_error is None else f"{summary.standard_error:.4f}",
            f"{summary.low:.4f} to {summary.high:.4f}",
            str(summary.num_items),
        )
        for name, summary in summaries(result.outcomes).items()
    ]
    out.table(columns, rows)
    for item in result.skipped:
        out.say(f"left out: {item}")
    cost = result.cost
    out.say(
        f"{cost.num_tokens} tokens in {cost.seconds:.1f} s "
        f"({cost.num_tokens / max(cost.seconds, 1e-9):.0f} tokens/s), "
        f"{format_bytes(cost.bytes_up)} up, {format_bytes(cost.bytes_down)} down, "
        f"{cost.num_vectors_released} vectors released"
    )
    out.say(f"noise on activations: {result.guarantee}")
