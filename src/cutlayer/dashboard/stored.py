"""What a state folder holds: federations, a server's training runs, an owner's runs. Read-only.

It opens nothing that a writer has locked, takes no lock, and neither makes nor mends a file, so it
may look while a server or a client works. What is encrypted it lists and does not open.
"""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

import msgspec

from cutlayer.errors import ConfigError, StorageError
from cutlayer.federation.store import FederationStore
from cutlayer.storage.files import explain_os_errors, read_private
from cutlayer.storage.vault import is_sealed

__all__ = ["SavedStep", "StoredKind", "StoredRun", "find_run", "run_details", "stored_runs"]

_STEP = re.compile(r"step-(\d{8})")
_FEDERATION_FILE = "federation.sqlite"


class StoredKind(StrEnum):
    """What a stored run is."""

    FEDERATION = "federation"
    SERVER_RUN = "server run"
    """The trunk adapter of one owner's run."""
    OWNER_RUN = "owner's run"
    """Head and tail, ledger and settings of a run, at its owner."""


@dataclass(frozen=True, kw_only=True)
class SavedStep:
    """One step, or one round, that can be gone back to."""

    step: int
    num_bytes: int
    saved_s: float
    """Unix time."""
    is_pinned: bool


@dataclass(frozen=True, kw_only=True)
class StoredRun:
    """One federation or run on disk."""

    kind: StoredKind
    name: str
    """OWNER/RUN_ID at a server, the folder's name at an owner, the federation's name."""
    folder: Path
    num_done: int
    """Finished rounds, or the newest saved step."""
    saved: tuple[SavedStep, ...]

    @property
    def num_bytes(self) -> int:
        """Of everything saved."""
        return sum(step.num_bytes for step in self.saved)

    @property
    def saved_s(self) -> float | None:
        """Unix time of the newest save."""
        return max((step.saved_s for step in self.saved), default=None)


def stored_runs(state: Path) -> list[StoredRun]:
    """Everything below a server's state folder, or an owner's folder of one or several runs.

    Raises:
        ConfigError: the folder is missing.
        StorageError: something in it cannot be read.
    """
    if not state.is_dir():
        raise ConfigError(f"{state} is no folder; name a server's state folder or a run's folder")
    with explain_os_errors(f"look through {state}"):
        return [*_federations(state), *_server_runs(state), *_owner_runs(state)]


def find_run(state: Path, name: str) -> StoredRun:
    """The stored run of that name.

    Raises:
        ConfigError: there is none; the message lists the names.
    """
    found = stored_runs(state)
    for run in found:
        if run.name == name:
            return run
    names = ", ".join(run.name for run in found) or "nothing"
    raise ConfigError(f"{state} holds no run {name!r}; it holds {names}")


def run_details(run: StoredRun) -> dict[str, object]:
    """What the newest saved step says in plain JSON: adapter settings, or the owner's progress.

    Empty where there is no step, or it is encrypted, or another step took its place just now.

    Raises:
        StorageError: a file is damaged or open to others.
    """
    if not run.saved:
        return {}
    name = "state.json" if run.kind is StoredKind.SERVER_RUN else "progress.json"
    path = _steps_folder(run) / f"step-{run.saved[-1].step:08d}" / name
    if not path.exists():
        return {}
    data = read_private(path)
    if is_sealed(data):
        return {}
    try:
        return msgspec.json.decode(data, type=dict[str, object])
    except msgspec.DecodeError as error:
        raise StorageError(f"{path} is damaged: {error}; restore it from a copy") from error


def _federations(state: Path) -> Iterator[StoredRun]:
    for file in _at_depths(state, _FEDERATION_FILE, 3):
        store = FederationStore.read_only(file.parent)
        try:
            name, num_done = store.federation, store.round
        finally:
            store.close()
        yield StoredRun(
            kind=StoredKind.FEDERATION,
            name=name,
            folder=file.parent,
            num_done=num_done,
            saved=_saved(file.parent / "checkpoints"),
        )


def _server_runs(state: Path) -> Iterator[StoredRun]:
    for folder in sorted((state / "runs").glob("*/*")):
        if not folder.is_dir() or (folder / "run.json").exists():
            continue
        saved = _saved(folder)
        yield StoredRun(
            kind=StoredKind.SERVER_RUN,
            name=f"{folder.parent.name}/{folder.name}",
            folder=folder,
            num_done=saved[-1].step if saved else 0,
            saved=saved,
        )


def _owner_runs(state: Path) -> Iterator[StoredRun]:
    for file in _at_depths(state, "run.json", 2):
        saved = _saved(file.parent / "steps")
        yield StoredRun(
            kind=StoredKind.OWNER_RUN,
            name=file.parent.resolve().name,
            folder=file.parent,
            num_done=saved[-1].step if saved else 0,
            saved=saved,
        )


def _at_depths(folder: Path, name: str, depths: int) -> Iterable[Path]:
    return [file for n in range(depths) for file in sorted(folder.glob("*/" * n + name))]


def _steps_folder(run: StoredRun) -> Path:
    return run.folder / "steps" if run.kind is StoredKind.OWNER_RUN else run.folder


def _saved(folder: Path) -> tuple[SavedStep, ...]:
    names = sorted(path.name for path in folder.glob("step-*") if _STEP.fullmatch(path.name))
    return tuple(step for step in (_saved_step(folder / name) for name in names) if step)


def _saved_step(folder: Path) -> SavedStep | None:
    """None if its writer removed it just now."""
    try:
        stats = [path.stat() for path in folder.iterdir()]
        saved_s = folder.stat().st_mtime
    except FileNotFoundError:
        return None
    return SavedStep(
        step=int(folder.name.removeprefix("step-")),
        num_bytes=sum(stat.st_size for stat in stats),
        saved_s=saved_s,
        is_pinned=(folder / "pinned").exists(),
    )
