"""One run in a process of its own: rows, method, official score, one result file.

    python -m cutlayer.suite.work SPEC.json FOLDER [--threads N] [--device D] [--cache FOLDER]

It keeps no store (`store`) and starts no second run (`run`).
"""

import argparse
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

import msgspec

from cutlayer.errors import ConfigError, CutlayerError
from cutlayer.storage.files import explain_os_errors, private_folder, write_atomic
from cutlayer.suite.compute import Compute
from cutlayer.suite.origin import machine_of, origin_of
from cutlayer.suite.result import Figures, RunResult
from cutlayer.suite.spec import Method, RunSpec

if TYPE_CHECKING:
    from cutlayer.evaluation.published.task_files import TaskFolder

__all__ = ["RESULT_FILE", "WorkOptions", "function_of", "main", "run_one"]

RESULT_FILE = "result.json"
"""What a run leaves in its folder."""
_COMMAND = "python -m cutlayer.suite.work SPEC.json FOLDER"
_ENVIRONMENT = {
    "OMP_WAIT_POLICY": "PASSIVE",
    "TOKENIZERS_PARALLELISM": "false",
    "TRANSFORMERS_VERBOSITY": "error",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
}

Run = Callable[[RunSpec, "TaskFolder", Path, Compute, Path | None], Figures]


@dataclass(frozen=True, kw_only=True)
class WorkOptions:
    """How a run is done; nothing of it changes what comes out."""

    compute: Compute = field(default_factory=Compute)
    """On what."""
    cache: Path | None = None
    """Of assets and converted models; None is the usual one."""
    command: str = _COMMAND
    """That makes the number again."""


def run_one(spec: RunSpec, folder: Path, options: WorkOptions) -> RunResult:
    """Do one run. What fails is a result too, with its error and no numbers.

    Args:
        spec: the run.
        folder: for its rows and its state; it must exist and be private.
        options: how.
    """
    began, start_s = datetime.now(UTC).isoformat(timespec="seconds"), time.monotonic()
    origin = origin_of(options.command, options.compute.threads, began)
    found = RunResult(spec=spec, origin=origin)
    try:
        found = _measured(found, folder, options)
    except CutlayerError as error:
        found = msgspec.structs.replace(found, error=f"{type(error).__name__}: {error}")
    except Exception as error:  # the top of a process: a defect in one run must not end the suite
        traceback.print_exc()
        found = msgspec.structs.replace(found, error=_defect(error))
    # Asked again: by now torch is there to say whether there is an accelerator. The commit is that
    # of the beginning: a checkout may have moved on.
    machine = machine_of(options.compute.threads)
    origin = msgspec.structs.replace(origin, machine=machine)
    seconds = time.monotonic() - start_s
    return msgspec.structs.replace(found, origin=origin, seconds=round(seconds, 3))


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of the process; 0, or 1 where the run failed."""
    found = _parser().parse_args(argv)
    signal.signal(signal.SIGTERM, _interrupt)
    if found.tied:
        threading.Thread(target=_end_with_parent, daemon=True).start()
    for name, value in {**_ENVIRONMENT, "OMP_NUM_THREADS": str(found.threads)}.items():
        os.environ.setdefault(name, value)
    options = WorkOptions(
        compute=Compute(threads=found.threads, device=found.device),
        cache=found.cache,
        command=found.command,
    )
    try:
        spec = _read_spec(found.spec)
        result = run_one(spec, private_folder(found.folder), options)
        write_atomic(found.folder / RESULT_FILE, msgspec.json.encode(result))
    except CutlayerError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(result.error or _numbers(result), file=sys.stderr)
    return int(result.error is not None)


def _measured(result: RunResult, folder: Path, options: WorkOptions) -> RunResult:
    from cutlayer.suite.rows import prepare
    from cutlayer.suite.scoring import scored

    spec = result.spec
    task = prepare(spec, folder, options.cache)
    figures = function_of(spec.method)(spec, task, folder, options.compute, options.cache)
    return scored(result, figures, task.questions())


def function_of(method: Method) -> Run:
    """The function that runs a method; only its own imports are paid."""
    if method in (Method.UNTUNED, Method.CENTRALISED):
        from cutlayer.suite.central import run_central

        return run_central
    if method is Method.SPLIT:
        from cutlayer.suite.split import run_split

        return run_split
    if method is Method.TOGETHER:
        from cutlayer.suite.together import run_together

        return run_together
    from cutlayer.suite.audited import run_audited

    return run_audited


def _defect(error: Exception) -> str:
    """Class and place, but no message: that of a library may hold a text."""
    place = traceback.extract_tb(error.__traceback__)[-1]
    where = f"{Path(place.filename).name}:{place.lineno}"
    return f"a defect: {type(error).__name__} at {where}; the log has more"


def _numbers(result: RunResult) -> str:
    named = ", ".join(f"{name} {value:.4f}" for name, value in sorted(result.metrics.items()))
    return f"{result.spec.run_id}: {result.seconds:.1f} s: {named or 'no score'}"


def _read_spec(path: Path) -> RunSpec:
    with explain_os_errors(f"read {path}"):
        data = path.read_bytes()
    try:
        return msgspec.json.decode(data, type=RunSpec)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not the spec of a run: {error}") from error


def _interrupt(number: int, frame: FrameType | None) -> None:
    """Unwind, so that servers and scripts of the run are stopped on the way."""
    raise KeyboardInterrupt


def _end_with_parent() -> None:
    """Stdin is a pipe that the suite holds open: it ends when the suite is killed."""
    # Not sys.stdin: its lock would be held when Python ends.
    while os.read(0, 1):
        pass
    os.kill(os.getpid(), signal.SIGTERM)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m cutlayer.suite.work", description=__doc__)
    parser.add_argument("spec", type=Path, metavar="SPEC.json")
    parser.add_argument("folder", type=Path, metavar="FOLDER")
    parser.add_argument("--threads", type=int, default=2, metavar="N")
    parser.add_argument("--device", default="cpu", metavar="D")
    parser.add_argument("--cache", type=Path, metavar="FOLDER")
    parser.add_argument("--command", default=_COMMAND, help="kept with the numbers")
    parser.add_argument("--tied", action="store_true", help="end when stdin does")
    return parser


if __name__ == "__main__":
    sys.exit(main())
