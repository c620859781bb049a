"""`cutlayer runs`: what a state folder holds. It reads only, also while its writer works."""

import time
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cutlayer.cli.federation_tables import (
    joined_names,
    print_members,
    print_published,
    print_rounds,
    printable,
    time_ago,
)
from cutlayer.cli.options import JsonOption
from cutlayer.cli.output import Output, format_bytes

if TYPE_CHECKING:
    from cutlayer.dashboard.stored import StoredRun
    from cutlayer.federation.store_rows import AttemptRow

__all__ = ["app", "list_runs", "show_run"]

app = typer.Typer(no_args_is_help=True, help="Federations and runs in a state folder.")

StateOption = Annotated[
    Path,
    typer.Option(
        "--state", metavar="FOLDER", help="A server's state folder, or an owner's run folder."
    ),
]
LastOption = Annotated[int, typer.Option("--last", min=1, help="Newest rounds to show.")]
NameArgument = Annotated[
    str, typer.Argument(metavar="NAME", help="As `cutlayer runs list` names it.")
]


@app.command("list")
def list_runs(state: StateOption = Path("state"), as_json: JsonOption = False) -> None:
    """List federations and training runs that a folder holds."""
    from cutlayer.dashboard.stored import stored_runs

    out = Output(as_json)
    found, now_s = stored_runs(state), time.time()
    rows = [
        (
            str(run.kind),
            printable(run.name),
            f"{_unit(run)} {run.num_done}",
            ", ".join(str(step.step) for step in run.saved),
            format_bytes(run.num_bytes),
            time_ago(run.saved_s, now_s),
        )
        for run in found
    ]
    if rows:
        out.table(("kind", "name", "at", "saved", "size", "newest"), rows)
    else:
        out.say(f"{state} holds no federation and no run")
    out.result({"runs": [_table(run) for run in found]})


@app.command("show")
def show_run(
    name: NameArgument,
    state: StateOption = Path("state"),
    last: LastOption = 20,
    as_json: JsonOption = False,
) -> None:
    """Show one federation's members and rounds, or one run's saved steps."""
    from cutlayer.dashboard.stored import StoredKind, find_run

    out = Output(as_json)
    run = find_run(state, name)
    out.say(f"{run.kind} {printable(run.name)}: {_unit(run)} {run.num_done}")
    if run.kind is StoredKind.FEDERATION:
        more = _show_federation(run, last, out)
    else:
        more = _show_steps(run, out)
    out.result(_table(run) | more)


def _show_federation(run: "StoredRun", last: int, out: Output) -> dict[str, object]:
    import msgspec

    from cutlayer.dashboard.federation_view import member_views, published_views, round_views
    from cutlayer.federation.store import FederationStore

    store = FederationStore.read_only(run.folder)
    try:
        rows = store.rounds(last)
        members = member_views(store.members(), rows, None)
        published = published_views(store.metrics(last))
        done = {(row.number, row.attempts) for row in store.rounds()}
        ended = [a for a in store.attempts() if a.ended_at is not None]
        failed = [a for a in ended if (a.round, a.number) not in done]
    finally:
        store.close()
    rounds = round_views(rows)
    print_members(members, time.time(), out)
    if rounds:
        print_rounds(rounds, out)
    if published:
        print_published(published, out)
    if failed:
        _print_failed(failed[-last:], out)
    return {
        "members": msgspec.to_builtins(members),
        "rounds": msgspec.to_builtins(rounds),
        "published": msgspec.to_builtins(published),
        "failed_attempts": msgspec.to_builtins(failed),
        "digest": rows[-1].digest if rows else None,
    }


def _print_failed(failed: "list[AttemptRow]", out: Output) -> None:
    rows = [
        (str(a.round), str(a.number), printable(a.outcome), joined_names(a.cohort)) for a in failed
    ]
    out.table(("round", "failed attempt", "why", "cohort"), rows)


def _show_steps(run: "StoredRun", out: Output) -> dict[str, object]:
    from cutlayer.dashboard.stored import run_details

    rows = [
        (
            str(step.step),
            _date(step.saved_s),
            format_bytes(step.num_bytes),
            "best or kept" if step.is_pinned else "",
        )
        for step in run.saved
    ]
    out.table(("step", "saved", "size", ""), rows)
    details = run_details(run)
    if "adapter" in details:
        out.say(f"adapter      {_flat(details['adapter'])}")
    if details.get("best_step") is not None:
        out.say(f"best step    {details['best_step']}")
    if details.get("evaluations"):
        out.say(f"validation   {_flat(details['evaluations'])}")
    return {"details": details}


def _flat(values: object) -> str:
    pairs = values.items() if isinstance(values, dict) else ()
    return ", ".join(f"{printable(str(key))} {printable(str(value))}" for key, value in pairs)


def _unit(run: "StoredRun") -> str:
    return "round" if str(run.kind) == "federation" else "step"


def _table(run: "StoredRun") -> dict[str, object]:
    return {
        "kind": str(run.kind),
        "name": run.name,
        "folder": str(run.folder),
        "num_done": run.num_done,
        "num_bytes": run.num_bytes,
        "saved_s": run.saved_s,
        "saved": [step.step for step in run.saved],
    }


def _date(seconds: float) -> str:
    return datetime.fromtimestamp(seconds).astimezone().strftime("%Y-%m-%d %H:%M:%S")
