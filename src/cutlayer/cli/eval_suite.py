"""`cutlayer eval suite` and `cutlayer eval report`: many runs and their page.

The work is in `suite`.
"""

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cutlayer.cli.options import JsonOption
from cutlayer.cli.output import Output, check_target
from cutlayer.cli.work import stop_on_sigterm
from cutlayer.errors import ConfigError, CutlayerError

if TYPE_CHECKING:
    from cutlayer.suite.result import RunResult
    from cutlayer.suite.spec import RunSpec
    from cutlayer.suite.store import Store

__all__ = ["report", "suite"]

ProfileOption = Annotated[
    str, typer.Option("--profile", metavar="NAME", help="small, medium or full.")
]
StoreOption = Annotated[
    Path, typer.Option("--out", metavar="FOLDER", help="Store of results; it may have some.")
]
JobsOption = Annotated[
    int, typer.Option("--jobs", min=1, metavar="N", help="Runs at once, a process each.")
]
ThreadsOption = Annotated[
    int, typer.Option("--threads", min=1, metavar="N", help="Threads of each run.")
]
DeviceOption = Annotated[
    str, typer.Option("--device", metavar="D", help="torch device of each run, such as cuda.")
]
OnlyOption = Annotated[
    str | None, typer.Option("--only", metavar="TEXT", help="Runs whose id has this text.")
]
ListOption = Annotated[bool, typer.Option("--list", help="Say which runs there are; run none.")]
ModelOption = Annotated[
    str | None,
    typer.Option("--model", metavar="M", help="Folder, GGUF file, hub id or asset:NAME."),
]
DataOption = Annotated[
    str | None,
    typer.Option("--data", metavar="FOLDER", help="Original files (or: packaged, hub)."),
]
FolderArgument = Annotated[Path, typer.Argument(metavar="FOLDER", help="Store of results.")]
PageOption = Annotated[
    Path | None,
    typer.Option("--out", metavar="FILE", help="Page to write; its pictures go to images beside."),
]


def suite(
    profile: ProfileOption = "small",
    folder: StoreOption = Path("build/evaluation"),
    jobs: JobsOption = 1,
    threads: ThreadsOption = 2,
    device: DeviceOption = "cpu",
    only: OnlyOption = None,
    lists: ListOption = False,
    model: ModelOption = None,
    data: DataOption = None,
    as_json: JsonOption = False,
) -> None:
    """Train and score many settings; started again, it does the runs that are missing.

    Everything happens on this machine, each run in a process of its own.
    """
    from cutlayer.suite.compute import Compute
    from cutlayer.suite.profiles import Choice, specs_of
    from cutlayer.suite.run import SuiteOptions, run_suite
    from cutlayer.suite.store import Store

    out = Output(as_json)
    stop_on_sigterm()
    specs = _chosen(specs_of(profile, Choice(model=model, data=data)), only)
    store = Store(folder)
    if lists:
        _list(specs, store, out)
        return
    compute = Compute(threads=threads, device=device)
    on = None if device == Compute().device else device
    command = _command({"profile": profile, "model": model, "data": data, "device": on})
    options = SuiteOptions(jobs=jobs, compute=compute, command=command)
    results = run_suite(specs, store, options, lambda line: out.errors.print(line, markup=False))
    _finish(results, folder, out)


def report(folder: FolderArgument, page: PageOption = None, as_json: JsonOption = False) -> None:
    """Write the page of a store: tables, pictures, where each number comes from."""
    from cutlayer.suite.store import Store

    out = Output(as_json)
    Store.existing(folder)
    target = folder / "report.md" if page is None else page
    check_target(target, "a page")
    from cutlayer.suite.report import write_report

    images = target.parent / "images"
    write_report(folder, target, images)
    out.say(f"report: {target}")
    out.result({"folder": str(folder), "report": str(target), "images": str(images)})


def _chosen(specs: "Sequence[RunSpec]", only: str | None) -> "list[RunSpec]":
    chosen = [spec for spec in specs if only is None or only in spec.run_id]
    if not chosen:
        raise ConfigError(
            f"no run has {only!r} in its id; --list shows them, such as {specs[0].run_id}"
        )
    return chosen


def _command(said: Mapping[str, str | None]) -> str:
    """As a shell takes it; options without a value are left out."""
    words = [(f"--{name}", value) for name, value in said.items() if value is not None]
    return shlex.join(["cutlayer", "eval", "suite", *(word for pair in words for word in pair)])


def _list(specs: "Sequence[RunSpec]", store: "Store", out: Output) -> None:
    states = {spec.run_id: _state(store.get(spec)) for spec in specs}
    out.table(("run", "state"), list(states.items()))
    num_done = sum(state == "done" for state in states.values())
    out.say(f"{num_done} of {len(specs)} runs are done")
    runs = [{"run_id": run_id, "state": state} for run_id, state in states.items()]
    out.result({"folder": str(store.folder), "runs": runs})


def _state(result: "RunResult | None") -> str:
    if result is None:
        return "missing"
    return "done" if result.error is None else "failed"


def _finish(results: "Sequence[RunResult]", folder: Path, out: Output) -> None:
    """Say what there is now.

    Raises:
        CutlayerError: a run failed.
    """
    failed = [result for result in results if result.error is not None]
    for result in failed:
        out.errors.print(f"failed: {result.spec.run_id}: {result.error}", markup=False)
    if failed:
        raise CutlayerError(
            f"{len(failed)} of {len(results)} runs failed, see above; what they said is in "
            f"{folder / 'logs'}, and the same command tries them again"
        )
    out.say(f"{len(results)} runs are in {folder}; cutlayer eval report {folder} makes a page")
    out.result({"folder": str(folder), "runs": [_values(result) for result in results]})


def _values(result: "RunResult") -> dict[str, object]:
    from cutlayer.suite.scoring import main_score

    metric, score = main_score(result) or (None, None)
    return {
        "run_id": result.spec.run_id,
        "metric": metric,
        "score": score,
        "recovery": result.recovery,
        "seconds": result.seconds,
    }
