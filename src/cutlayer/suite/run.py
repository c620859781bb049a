"""Many runs: the missing ones, each in a process of its own, several at once.

A run that fails takes no other with it. It measures nothing (`work`) and prints nothing.
"""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Self

import msgspec

from cutlayer.storage.files import explain_os_errors
from cutlayer.suite.compute import Compute
from cutlayer.suite.origin import origin_of
from cutlayer.suite.result import Origin, RunResult
from cutlayer.suite.scoring import main_score
from cutlayer.suite.spec import RunSpec
from cutlayer.suite.store import Store
from cutlayer.suite.work import RESULT_FILE, WorkOptions

__all__ = ["SuiteOptions", "run_suite"]

_POLL_S = 0.2
_STOP_S = 30.0
_LOG_FILE = "log.txt"

Say = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class SuiteOptions:
    """How a suite is done; nothing of it changes what comes out."""

    jobs: int = 1
    """Runs at once."""
    compute: Compute = field(default_factory=Compute)
    """Of each run."""
    cache: Path | None = None
    """Of assets and converted models; None is the usual one."""
    command: str = "cutlayer eval suite"
    """What makes these runs; ` --only RUN_ID` is added to it in each result."""


def run_suite(
    specs: Sequence[RunSpec], store: Store, options: SuiteOptions, say: Say
) -> list[RunResult]:
    """Do the runs that the store lacks, and those that failed before.

    Args:
        specs: the runs; equal ones are done once.
        store: gets each result when it is there; nothing else is kept.
        options: how.
        say: gets a line when a run begins and when it ends.

    Returns:
        The results of all specs, in their order; `error` says which failed.

    Raises:
        StorageError: another suite writes to the store, or it cannot be written.
        KeyboardInterrupt: by Ctrl-C; runs under way are stopped, ended ones are kept.
    """
    wanted = list(dict.fromkeys(specs))
    with store.locked(), _Children(store, options) as children:
        numbered = [(number, spec) for number, spec in enumerate(wanted, 1)]
        missing = deque(pair for pair in numbered if not store.is_done(pair[1]))
        if len(missing) < len(wanted):
            say(f"{len(wanted) - len(missing)} of {len(wanted)} runs were done before")
        while missing or children.running:
            while missing and len(children.running) < options.jobs:
                number, spec = missing.popleft()
                children.start(number, spec)
                say(f"{number} of {len(wanted)}: {spec.run_id} begins")
            for number, result in children.ended():
                store.put(result)
                say(f"{number} of {len(wanted)}: {_in_words(result)}")
            time.sleep(_POLL_S)
    return [kept for spec in wanted if (kept := store.get(spec)) is not None]


@dataclass(kw_only=True)
class _Child:
    number: int
    spec: RunSpec
    folder: Path
    process: "subprocess.Popen[bytes]"
    origin: Origin
    """Should it leave none itself: of its beginning, since sources may change meanwhile."""
    start_s: float = field(default_factory=time.monotonic)


class _Children:
    """Runs under way; none outlives the block."""

    def __init__(self, store: Store, options: SuiteOptions) -> None:
        self._store, self._options = store, options
        self.running: list[_Child] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for child in self.running:
            _signal_group(child.process, signal.SIGTERM)
        deadline_s = time.monotonic() + _STOP_S
        for child in self.running:
            _end(child.process, deadline_s)

    def start(self, number: int, spec: RunSpec) -> None:
        folder = self._store.work_folder(spec)
        command = f"{self._options.command} --only {spec.run_id}"
        options = WorkOptions(
            compute=self._options.compute, cache=self._options.cache, command=command
        )
        began = datetime.now(UTC).isoformat(timespec="seconds")
        origin = origin_of(command, options.compute.threads, began)
        with explain_os_errors(f"start a run in {folder}"):
            (folder / "spec.json").write_bytes(msgspec.json.encode(spec))
            process = _started(folder, options)
        self.running.append(
            _Child(number=number, spec=spec, folder=folder, process=process, origin=origin)
        )

    def ended(self) -> Iterator[tuple[int, RunResult]]:
        """Results of runs that ended since the last call, one at a time: each is kept at once."""
        for child in [child for child in self.running if child.process.poll() is not None]:
            result = self._result(child)
            self.running.remove(child)
            yield child.number, result
            with explain_os_errors(f"clean {child.folder}"):
                shutil.rmtree(child.folder)

    def _result(self, child: _Child) -> RunResult:
        # Whatever the run itself left behind: it is the group's leader.
        _end(child.process, time.monotonic())
        result = _written(child.folder) or self._crashed(child)
        if result.error is not None:
            with explain_os_errors(f"keep the log of {child.spec.run_id}"):
                shutil.move(child.folder / _LOG_FILE, self._store.log_file(child.spec))
        return result

    def _crashed(self, child: _Child) -> RunResult:
        return RunResult(
            spec=child.spec,
            origin=child.origin,
            error=_end_in_words(child.process.returncode),
            seconds=round(time.monotonic() - child.start_s, 3),
        )


def _started(folder: Path, options: WorkOptions) -> "subprocess.Popen[bytes]":
    cache = [] if options.cache is None else ["--cache", str(options.cache)]
    threads, device = str(options.compute.threads), options.compute.device
    with (folder / _LOG_FILE).open("wb") as log:
        return subprocess.Popen(
            [
                *(sys.executable, "-m", "cutlayer.suite.work"),
                *(str(folder / "spec.json"), str(folder), "--tied"),
                *("--threads", threads, "--device", device, "--command", options.command, *cache),
            ],
            # Held open while we live; see `work`.
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**os.environ, "OMP_NUM_THREADS": threads, "OMP_WAIT_POLICY": "PASSIVE"},
            # Ctrl-C is ours alone, and a whole group can be ended.
            start_new_session=True,
        )


def _written(folder: Path) -> RunResult | None:
    """None also where this process cannot read it, as when the sources changed meanwhile."""
    path = folder / RESULT_FILE
    if not path.exists():
        return None
    with explain_os_errors(f"read {path}"):
        data = path.read_bytes()
    try:
        return msgspec.json.decode(data, type=RunResult)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return None


def _end(process: "subprocess.Popen[bytes]", deadline_s: float) -> None:
    """Wait, then kill what is left of the process and those that it started."""
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(max(0.0, deadline_s - time.monotonic()))
    _signal_group(process, signal.SIGKILL)
    process.wait()
    if process.stdin is not None:
        process.stdin.close()


def _signal_group(process: "subprocess.Popen[bytes]", number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, number)


def _end_in_words(code: int) -> str:
    if code == -signal.SIGKILL:
        return "killed; the system may have run out of memory: use fewer --jobs"
    if code < 0:
        return f"ended by signal {-code}; the log has more"
    return f"ended with exit code {code} and no result that can be read; the log has more"


def _in_words(result: RunResult) -> str:
    words = f"{result.spec.run_id} {result.seconds:.1f} s"
    if result.error is not None:
        return f"{words} FAILED: {result.error}"
    if (score := main_score(result)) is not None:
        return f"{words}, {score[0]} {score[1]:.4f}"
    return words if result.recovery is None else f"{words}, recovery {result.recovery:.4f}"
