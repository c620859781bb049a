"""One timeline of all parties, in one file."""

import json
from pathlib import Path

import pytest

from cutlayer.simulation.timeline import timeline_to
from cutlayer.trace import Trace


def _lanes(path: Path) -> set[str]:
    events = json.loads(path.read_text())["traceEvents"]
    return {event["args"]["name"] for event in events if event["name"] == "thread_name"}


def test_parties_of_one_and_of_other_processes_end_in_one_file(tmp_path: Path) -> None:
    out = tmp_path / "trace.json"
    with timeline_to(out) as timeline:
        with timeline.of("movies").span("client", "head"):
            pass
        timeline.of("nyt").add("client", "tail", 1.0, 2.0)
        other, missing = timeline.file("server"), timeline.file("killed")
        assert other is not None
        assert missing is not None
        trace = Trace("server")
        trace.add("runner", "forward", 1.0, 2.0)
        trace.write(other)
    assert _lanes(out) == {"movies client", "nyt client", "runner"}
    assert not other.exists()


def test_a_failed_run_leaves_its_timeline(tmp_path: Path) -> None:
    out = tmp_path / "trace.json"

    def fail() -> None:
        with timeline_to(out) as timeline:
            timeline.of("movies").add("client", "tail", 1.0, 2.0)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert _lanes(out) == {"movies client"}


def test_nothing_is_timed_without_a_file() -> None:
    with timeline_to(None) as timeline:
        assert timeline.file("server") is None
        with timeline.of("movies").span("client", "head"):
            pass
