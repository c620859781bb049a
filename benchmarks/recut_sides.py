"""The two processes of the crash test: a trunk server, and an owner whose cut moves by a plan.

They are forked off `recut_crashes`, which has no thread and no link of its own.
"""

import signal
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import ParamSpec, TypeVar

import msgspec
import torch

from benchmarks.recut_boundaries import Boundaries
from cutlayer import Client, ClientSettings, ServerSettings, TrunkServer
from cutlayer.client.link import Link, PendingCall
from cutlayer.client.recut import Recutter
from cutlayer.client.recut_desk import RecutRequest
from cutlayer.client.remote_trunk import RemoteTrunk
from cutlayer.client.train import Report
from cutlayer.model.partition import Cut
from cutlayer.server.recut import Forks
from cutlayer.storage.files import write_atomic

__all__ = ["own", "serve", "wanted_at"]

P = ParamSpec("P")
R = TypeVar("R")


def serve(settings: ServerSettings, boundaries: Boundaries) -> None:
    """Serve until it is killed."""
    torch.set_num_threads(1)
    # From the first fork to the settlement of the two runs.
    Forks.fork = _beginning(boundaries, boundaries.around(Forks.fork))  # type: ignore[method-assign]
    Forks.settle = _ending(boundaries, boundaries.around(Forks.settle))  # type: ignore[method-assign]
    boundaries.watch_files()
    server = TrunkServer(settings)
    server.start()
    signal.pause()


def own(
    settings: ClientSettings, plan: Mapping[int, Cut], boundaries: Boundaries, result: Path
) -> None:
    """Train to the end, wherever an earlier process was killed; then write the history."""
    torch.set_num_threads(1)
    _watch_recuts(boundaries)
    boundaries.watch_files()
    with Client(settings) as client:

        def want(report: Report) -> None:
            cut, model = wanted_at(plan, report.record.step), client.settings.model
            if cut is not None and cut != Cut(model.lower, model.upper):
                _ask(settings.run.folder, cut)

        progress = client.train(want)
        client.export(result.with_suffix(".adapter"))
    write_atomic(result, msgspec.json.encode(progress.history))


def wanted_at(plan: Mapping[int, Cut], step: int) -> Cut | None:
    """The cut that a run is to have after a step; None as it began."""
    return plan[max(due)] if (due := [first for first in plan if first <= step]) else None


def _watch_recuts(boundaries: Boundaries) -> None:
    """From the first check until the run is open again."""
    Link.send = boundaries.around(Link.send)  # type: ignore[method-assign]
    PendingCall.result = boundaries.around(PendingCall.result)  # type: ignore[method-assign]
    move, opened = boundaries.around(Recutter.move), boundaries.around(RemoteTrunk.open_run)
    Recutter.move = _beginning(boundaries, move)  # type: ignore[method-assign]
    RemoteTrunk.open_run = _ending(boundaries, opened)  # type: ignore[method-assign]


def _beginning(boundaries: Boundaries, function: Callable[P, R]) -> Callable[P, R]:
    def inside(*args: P.args, **kwargs: P.kwargs) -> R:
        boundaries.begin()
        return function(*args, **kwargs)

    return inside


def _ending(boundaries: Boundaries, function: Callable[P, R]) -> Callable[P, R]:
    def inside(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return function(*args, **kwargs)
        finally:
            boundaries.end()

    return inside


def _ask(folder: Path, cut: Cut) -> None:
    """What `cutlayer recut` would leave here; nobody waits for the answer."""
    request = RecutRequest(name="plan", lower=cut.lower, upper=cut.upper, share_adapter=True)
    write_atomic(folder / "recut.request", msgspec.json.encode(request))
