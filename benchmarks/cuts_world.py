"""A server and six owners of different cuts in this process, over mutual TLS, for `cuts_mixed`.

It measures nothing.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from benchmarks.parity_server import parity_client, parity_server
from benchmarks.split import make_kits
from cutlayer import Client, TrunkServer
from cutlayer.client.train import Report
from cutlayer.model.cut import Cut

__all__ = ["Arm", "Subject", "running", "six_cuts", "train_all"]

NAME = "cuts"
_WORDS = ("trade", "music", "law", "sport", "river", "winter", "engine", "paper", "cloud", "stone")
_DEEP = 12
"""From so many blocks on a model has room for cuts of up to eight blocks at the client."""

Section = Mapping[str, object]
OnStep = Callable[[TrunkServer, int, Report], None]
"""Server, number of the owner, and the step that it has finished."""


@dataclass(frozen=True, kw_only=True)
class Subject:
    """What is trained, and on what."""

    model: Path
    num_blocks: int
    rows: int
    """Of each owner; all of them are in every step."""
    words: int
    """Of each row."""


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One federation."""

    cuts: Sequence[Cut]
    """Of each owner."""
    rounds: int
    local_steps: int
    strategy: Section
    secure: Section
    batch: Section


def six_cuts(num_blocks: int) -> tuple[list[Cut], Cut]:
    """Six different cuts, and the one that gives six clients as many blocks together."""
    n = num_blocks
    if n >= _DEEP:
        edges = [(1, n - 1), (1, n - 2), (2, n - 2), (3, n - 3), (4, n - 3), (4, n - 4)]
        return [Cut(*edge) for edge in edges], Cut(2, n - 3)
    edges = [(0, n), (1, n), (1, n - 1), (0, n - 2), (2, n - 1), (2, n - 2)]
    return [Cut(*edge) for edge in edges], Cut(1, n - 1)


@contextmanager
def running(subject: Subject, arm: Arm, folder: Path) -> Iterator[tuple[TrunkServer, list[Client]]]:
    """A server of all blocks that one of the cuts leaves it, and the owners.

    Args:
        subject: model and rows.
        arm: cuts and rules.
        folder: private, made here.
    """
    folder.mkdir(mode=0o700)
    names = [f"owner{number}" for number in range(len(arm.cuts))]
    kits = make_kits(folder / "kits", names)
    served = Cut(min(cut.lower for cut in arm.cuts), max(cut.upper for cut in arm.cuts))
    rules = {"federation": _rules(arm), "batch": arm.batch, **_cut(subject, served)}
    with ExitStack() as stack:
        state = folder / "state"
        server = stack.enter_context(parity_server(subject.model, state, kits.server, rules))
        clients = [
            stack.enter_context(
                parity_client(
                    subject.model,
                    folder / name,
                    server.port,
                    kits.clients[name],
                    {**_owner(subject, folder, number), **_cut(subject, cut)},
                )
            )
            for number, (name, cut) in enumerate(zip(names, arm.cuts, strict=True))
        ]
        yield server, clients


def train_all(
    server: TrunkServer, clients: Sequence[Client], on_step: OnStep = lambda *seen: None
) -> None:
    """Every owner takes part until the federation ends."""

    def train(number: int) -> None:
        clients[number].train(lambda report: on_step(server, number, report))

    with ThreadPoolExecutor(len(clients)) as threads:
        list(threads.map(train, range(len(clients))))


def _rules(arm: Arm) -> Section:
    return {
        "name": NAME,
        "rounds": arm.rounds,
        "local_steps": arm.local_steps,
        "mixed_cuts": True,
        "adapter": {"rank": 8, "alpha": 16},
        "strategy": arm.strategy,
        "secure": arm.secure,
        # Nobody may miss a round, or its work is another one.
        "gather_s": 0.0,
        "min_members": len(arm.cuts),
        "quorum": len(arm.cuts),
    }


def _owner(subject: Subject, folder: Path, number: int) -> dict[str, Section]:
    """An owner with rows of its own, who does not mind that some blocks are its alone."""
    path = folder / f"rows{number}.jsonl"
    rows = [
        {
            "text": " ".join(
                _WORDS[(7 * number + row + place**2) % 10] for place in range(subject.words)
            )
        }
        for row in range(subject.rows)
    ]
    path.write_text("".join(json.dumps({**row, "end": "end"}) + "\n" for row in rows))
    return {
        "federation": {"name": NAME, "min_cohort": 1, "share_plain_updates": True},
        "data": {
            "train": str(path),
            "prompt_template": "{text}",
            "completion_template": " {end} {text}",
            "chat_template": False,
        },
        "train": {"rows_per_step": subject.rows, "lr": 1e-3, "schedule": "constant"},
    }


def _cut(subject: Subject, cut: Cut) -> dict[str, Section]:
    model = {"path": str(subject.model), "lower": cut.lower, "upper": cut.upper}
    return {"model": {**model, "threads": 1}}
