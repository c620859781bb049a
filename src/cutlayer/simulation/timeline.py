"""One timeline of all parties: who was busy when. Without a file nothing is timed.

It does not know what is timed.
"""

import tempfile
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

from cutlayer.trace import NoTrace, Trace, Tracer, merge_traces

__all__ = ["Timeline", "timeline_to"]


class _Named:
    """Lanes of one party in a trace that several share: threads of one process have one number."""

    def __init__(self, trace: Trace, party: str) -> None:
        self._trace, self._party = trace, party

    def span(self, lane: str, name: str, **values: int | str) -> AbstractContextManager[None]:
        """See `Tracer`."""
        return self._trace.span(f"{self._party} {lane}", name, **values)

    def add(self, lane: str, name: str, began_s: float, ended_s: float) -> None:
        """See `Tracer`."""
        self._trace.add(f"{self._party} {lane}", name, began_s, ended_s)


class Timeline:
    """Collects the spans of this process, and the files that other processes write."""

    def __init__(self, folder: Path | None) -> None:
        """
        Args:
            folder: of the parties' files; None times nothing.
        """
        self._folder = folder
        self._trace = None if folder is None else Trace("simulation")
        self._files: list[Path] = []

    def of(self, party: str) -> Tracer:
        """Where a party in this process writes."""
        return NoTrace() if self._trace is None else _Named(self._trace, party)

    def file(self, party: str) -> Path | None:
        """The file that a party in a process of its own is told to write."""
        if self._folder is None:
            return None
        self._files.append(self._folder / f"{party}.json")
        return self._files[-1]

    def write(self, out: Path) -> None:
        """Join everything; a process that was killed has left no file."""
        if self._trace is None or self._folder is None:
            return
        own = self._folder / "simulation.json"
        self._trace.write(own)
        merge_traces([own, *(path for path in self._files if path.exists())], out)


@contextmanager
def timeline_to(out: Path | None) -> Iterator[Timeline]:
    """A timeline that is written to `out` when the block ends, however it ends."""
    if out is None:
        yield Timeline(None)
        return
    with tempfile.TemporaryDirectory(prefix="cutlayer-trace-") as name:
        timeline = Timeline(Path(name))
        try:
            yield timeline
        finally:
            timeline.write(out)
