"""A small federation to test in: one server, several owners in threads, loopback channels."""

import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from cutlayer import Client, ClientSettings, TrunkServer
from tests.worlds import Table, client_of, client_settings, write_rows

NAMES = ("anna", "bert", "cleo")
T = TypeVar("T")


def federation(**changes: object) -> Table:
    """Rules for three members, two rounds of two steps."""
    table: Table = {
        "name": "trial",
        "rounds": 2,
        "local_steps": 2,
        "adapter": {"rank": 4, "alpha": 8},
        "gather_s": 0.2,
        "phase_deadline_s": 20.0,
    }
    return {**table, **changes}


def owner_settings(
    model: Path, folder: Path, name: str, num_rows: int = 8, **changes: object
) -> ClientSettings:
    """An owner with a folder and rows of its own; called again, it is the same owner."""
    own = folder / name
    own.mkdir(mode=0o700, exist_ok=True)
    rows = write_rows(own / "own.jsonl", num_rows)
    table: Table = {"train__steps": None, "federation__name": "trial", **changes}
    return client_settings(model, own, data__train=str(rows), **table)


def lone_settings(
    model: Path, folder: Path, name: str, num_rows: int, **changes: object
) -> ClientSettings:
    """The same owner without a federation."""
    own = folder / name
    own.mkdir(mode=0o700, exist_ok=True)
    rows = write_rows(own / "own.jsonl", num_rows)
    return client_settings(model, own, data__train=str(rows), **changes)


def owners(
    server: TrunkServer, model: Path, folder: Path, names: Sequence[str] = NAMES, **changes: object
) -> list[Client]:
    """Owners of that many names with 8, 12, 16 ... rows."""
    return [
        client_of(server, owner_settings(model, folder, name, 8 + 4 * number, **changes), name)
        for number, name in enumerate(names)
    ]


def at_once(works: Sequence[Callable[[], T]], timeout_s: float = 120.0) -> list[T]:
    """Run in threads; results in order, or the first error."""
    results: dict[int, T] = {}
    errors: list[BaseException] = []

    def run(number: int) -> None:
        try:
            results[number] = works[number]()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(n,), daemon=True) for n in range(len(works))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout_s)
    if errors:
        raise errors[0]
    assert len(results) == len(works), "a member did not end"
    return [results[number] for number in range(len(works))]
