"""Who was busy when: a timeline in the Chrome trace format, which Perfetto opens.

It knows names and times only; no tensor, token or text reaches it.
"""

import json
import os
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Protocol

__all__ = ["NoTrace", "Trace", "Tracer", "merge_traces", "written"]


class Tracer(Protocol):
    """Where spans go."""

    def span(self, lane: str, name: str, **values: int | str) -> AbstractContextManager[None]:
        """Time what happens inside the `with` block."""

    def add(self, lane: str, name: str, began_s: float, ended_s: float) -> None:
        """A span that is over already; times of `time.time()`."""


class NoTrace:
    """Keeps nothing."""

    def span(self, lane: str, name: str, **values: int | str) -> AbstractContextManager[None]:
        """Nothing is timed."""
        return nullcontext()

    def add(self, lane: str, name: str, began_s: float, ended_s: float) -> None:
        """Nothing is kept."""


class Trace:
    """Collects spans of one process; thread-safe. A lane is a row of the picture."""

    def __init__(self, process: str) -> None:
        self._process = process
        self._lanes: dict[str, int] = {}
        self._events: list[dict[str, object]] = []
        self._lock = threading.Lock()

    @contextmanager
    def span(self, lane: str, name: str, **values: int | str) -> Iterator[None]:
        """Time what happens inside the `with` block; it counts also when it raises."""
        began_s = time.time()
        try:
            yield
        finally:
            self._keep(lane, name, began_s, time.time(), dict(values))

    def add(self, lane: str, name: str, began_s: float, ended_s: float) -> None:
        """A span that is over already; times of `time.time()`."""
        self._keep(lane, name, began_s, ended_s, {})

    def write(self, path: Path) -> None:
        """Write the Chrome trace JSON."""
        with self._lock:
            events = [*self._names(), *self._events]
        path.write_text(json.dumps({"traceEvents": events, "displayTimeUnit": "ms"}))

    def _keep(
        self, lane: str, name: str, began_s: float, ended_s: float, values: dict[str, int | str]
    ) -> None:
        event: dict[str, object] = {
            "name": name,
            "ph": "X",
            "ts": round(began_s * 1e6),
            "dur": round((ended_s - began_s) * 1e6),
            "pid": os.getpid(),
            "args": values,
        }
        with self._lock:
            event["tid"] = self._lanes.setdefault(lane, len(self._lanes))
            self._events.append(event)

    def _names(self) -> list[dict[str, object]]:
        pid = os.getpid()
        process = {"name": "process_name", "ph": "M", "pid": pid, "args": {"name": self._process}}
        lanes = [
            {"name": "thread_name", "ph": "M", "pid": pid, "tid": tid, "args": {"name": lane}}
            for lane, tid in self._lanes.items()
        ]
        return [process, *lanes]


@contextmanager
def written(trace: Trace | None, path: Path | None) -> Iterator[None]:
    """Write the trace, if there is one, when the block ends, however it ends."""
    try:
        yield
    finally:
        if trace is not None and path is not None:
            trace.write(path)


def merge_traces(files: Sequence[Path], out: Path) -> None:
    """Join traces of several processes of one machine (or with clocks in step) into one file."""
    events = [event for file in files for event in json.loads(file.read_text())["traceEvents"]]
    out.write_text(json.dumps({"traceEvents": events, "displayTimeUnit": "ms"}))
