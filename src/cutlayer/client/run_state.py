"""The owner's private folder of one run: id, saved steps, secret and ledger, audit log.

It does not train. What is saved: head and tail adapters, their optimizers, and `Progress`; the
ledger is apart and is never taken back.

A re-cut writes its steps to a folder `steps.c<k>` and then `run.json`, which names k and the cut:
before that file is replaced the run is the old one, afterwards the new one. Whoever opens the run
next deletes what belongs to the other.
"""

import secrets
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import msgspec
from safetensors.torch import save
from torch import Tensor

from cutlayer.client.run_file import DEEPEST, RUN_FILE, cut_of, deepest_of, read_note
from cutlayer.client.settings import RunSettings
from cutlayer.errors import ConfigError, StorageError
from cutlayer.model.partition import Cut
from cutlayer.model.tensor_file import read_tensors
from cutlayer.privacy.run_privacy import RunPrivacy, open_run_privacy
from cutlayer.storage.audit_log import AuditLog
from cutlayer.storage.files import (
    explain_os_errors,
    private_folder,
    sync_folder,
    write_atomic,
)
from cutlayer.storage.steps import StepStore
from cutlayer.storage.vault import open_run_vault, open_vault
from cutlayer.wire.recut_messages import fork_id

__all__ = [
    "MEMBERS_CUTS",
    "Progress",
    "RecutSteps",
    "RunState",
    "SavedStep",
    "StepRecord",
]

MEMBERS_CUTS = "members' cuts"
"""What a run is claimed with once it is known whether its federation has one cut: equal, mixed."""
_STEPS, _DOOMED = "steps", ".cutlayer-tmp"


class StepRecord(msgspec.Struct, frozen=True, kw_only=True):
    """One finished step as the owner sees it; it never leaves."""

    step: int
    loss: float
    """Mean over the step's scored tokens."""
    num_tokens: int
    """Tokens of the step's rows."""
    num_scored: int
    """Tokens in the loss."""
    grad_norm: float
    """Global norm of the mean gradient, before the clip."""
    lr: float


class Progress(msgspec.Struct, kw_only=True):
    """Where a run stands; saved with every step."""

    step: int = 0
    history: list[StepRecord] = msgspec.field(default_factory=list)
    evaluations: dict[str, float] = msgspec.field(default_factory=dict)
    """Mean validation loss by step."""
    best_step: int | None = None
    num_worse: int = 0
    """Evaluations since the best one."""


@dataclass(frozen=True, kw_only=True)
class SavedStep:
    """What one saved step holds."""

    progress: Progress
    tensors: Mapping[str, dict[str, Tensor]]
    """By file: head, tail, head_optimizer, tail_optimizer."""


class RunState:
    """Open for one process at a time: the ledger's lock keeps a second one out."""

    def __init__(self, settings: RunSettings) -> None:
        """Open or create the folder.

        Raises:
            StorageError: the folder is open to others, in use, or its key is missing.
        """
        self.folder = private_folder(settings.folder)
        self.vault = open_run_vault(self.folder, open_vault(settings.key_file))
        self._known = self._read_known()
        # The ledger's own name for the run: no re-cut changes it.
        self.privacy: RunPrivacy = open_run_privacy(self.folder, self._known["run_id"], self.vault)
        self.audit = AuditLog(self.folder / "audit.jsonl")
        self._settle()
        self._steps = StepStore(self.folder / _STEPS, self.vault)

    @property
    def run_id(self) -> str:
        """The run, as the server knows it: every re-cut gives it another name there."""
        return self._known.get("served_id", self._known["run_id"])

    @property
    def cut(self) -> Cut | None:
        """Where the run was begun, or where its last re-cut left it; None before any training."""
        return cut_of(self._known)

    @property
    def has_equal_cuts(self) -> bool:
        """Whether the run's federation is known to have one cut for all members."""
        return self._known.get(MEMBERS_CUTS) == "equal"

    def close(self) -> None:
        """Release the files."""
        self.privacy.ledger.close()
        self.audit.close()

    def saved_steps(self) -> list[int]:
        """Steps that can be gone back to, ascending."""
        return self._steps.steps()

    def save(
        self, progress: Progress, tensors: Mapping[str, Mapping[str, Tensor]], is_pinned: bool
    ) -> None:
        """Make a step durable."""
        self._steps.save(progress.step, _step_files(progress, tensors), is_pinned)

    def load(self, step: int) -> SavedStep:
        """A saved step.

        Raises:
            StorageError: it is not saved, or a file was changed.
        """
        files = self._steps.load(step)
        try:
            progress = msgspec.json.decode(files.pop("progress.json"), type=Progress)
        except (KeyError, msgspec.DecodeError) as error:
            raise StorageError(f"{self.folder}: step {step} has no readable progress") from error
        tensors = {name.removesuffix(".safetensors"): read_tensors(files, name) for name in files}
        return SavedStep(progress=progress, tensors=tensors)

    def adapters(self, step: int) -> list[dict[str, Tensor]]:
        """Adapters of head and tail of a saved step."""
        tensors = self.load(step).tensors
        return [tensors["head"], tensors["tail"]]

    def best_step(self) -> int:
        """The best step by validation, else the newest.

        Raises:
            ConfigError: nothing has been trained yet.
        """
        steps = self.saved_steps()
        if not steps or steps[-1] == 0:
            raise ConfigError(f"{self.folder} has no trained step; run `cutlayer train`")
        best = self.load(steps[-1]).progress.best_step
        return best if best in steps else steps[-1]

    def go_back_to(self, step: int) -> SavedStep:
        """Load a step and forget the later ones; the ledger keeps their lines."""
        saved = self.load(step)
        self._steps.drop_after(step)
        return saved

    def forget_after(self, step: int) -> None:
        """Delete saved steps later than this one."""
        self._steps.drop_after(step)

    def begin_recut(self) -> "RecutSteps":
        """Somewhere to put the steps of the run with another cut; the run is not changed."""
        return RecutSteps(
            StepStore(self._recut_folder(self._num_recuts + 1, empty=True), self.vault)
        )

    def forget_recut(self) -> None:
        """Delete what a re-cut wrote that was broken off; one that was decided stays."""
        self._recut_folder(self._num_recuts + 1, empty=True)

    def finish_recut(self, cut: Cut, identity: Mapping[str, str]) -> None:
        """Become the run with the other cut: all of it, or none of it where this fails.

        Args:
            cut: the new one.
            identity: what `claim` is to find from now on, beside the cut.
        """
        changed = {
            "served_id": fork_id(self.run_id),
            "generation": str(self._num_recuts + 1),
            "cut": f"{cut.lower}:{cut.upper}",
            DEEPEST: str(max(deepest_of(self._known), cut.lower)),
        }
        try:
            self.write_note(RUN_FILE, {**self._known, **identity, **changed})
        finally:
            # Even where the write failed at its very end: what is on disk has decided.
            self._known = self._read_known()
        self._settle()
        self._steps = StepStore(self.folder / _STEPS, self.vault)

    def read_note(self, name: str) -> dict[str, str]:
        """A small private table kept beside the run; empty where there is none.

        Raises:
            StorageError: the file is damaged.
        """
        if not (self.folder / name).exists():
            return {}
        return read_note(self.folder, name, self.vault)

    def write_note(self, name: str, table: Mapping[str, str]) -> None:
        """Keep a small private table, durably."""
        data = msgspec.json.encode(dict(table))
        write_atomic(self.folder / name, self.vault.seal(data, name))

    def claim(self, identity: Mapping[str, str]) -> None:
        """Fix what must not change within a run (adapter settings, data, cut), by name.

        Raises:
            ConfigError: the folder holds a run that was started with other values.
        """
        self.check(identity)
        if not identity.keys() <= self._known.keys():
            self._known = {**self._known, **identity}
            self._write_known()

    def check(self, identity: Mapping[str, str]) -> None:
        """Refuse what `claim` would refuse, and fix nothing.

        Raises:
            ConfigError: as `claim`.
        """
        for name, value in identity.items():
            if self._known.get(name, value) != value:
                more = "; `cutlayer recut` moves the cut of a run" if name == "cut" else ""
                raise ConfigError(
                    f"{self.folder} holds a run that was started with other {name}; choose "
                    f"another run.folder or put the old {name} settings back{more}"
                )

    @property
    def _num_recuts(self) -> int:
        return int(self._known.get("generation", "0"))

    def _recut_folder(self, number: int, empty: bool = False) -> Path:
        path = self.folder / f"{_STEPS}.c{number}"
        if empty and path.exists():
            _remove(path)
        return path

    def _settle(self) -> None:
        """Finish a re-cut that was decided, and forget one that was not."""
        steps, new = self.folder / _STEPS, self._recut_folder(self._num_recuts)
        for path in self.folder.glob(f".{_STEPS}*{_DOOMED}"):
            shutil.rmtree(path)
        for path in sorted(self.folder.glob(f"{_STEPS}.c*")):
            if path != new:
                _remove(path)
        if new.exists():
            if steps.exists():
                _remove(steps)
            with explain_os_errors(f"put {new} in place"):
                new.rename(steps)
                sync_folder(self.folder)

    def _read_known(self) -> dict[str, str]:
        if not (self.folder / RUN_FILE).exists():
            self._known = {"run_id": secrets.token_hex(12)}
            self._write_known()
            return self._known
        return self.read_note(RUN_FILE)

    def _write_known(self) -> None:
        self.write_note(RUN_FILE, self._known)


class RecutSteps:
    """The saved steps of a run with its new cut, before it is that run."""

    def __init__(self, store: StepStore) -> None:
        """Use `RunState.begin_recut`."""
        self._store = store

    def save(
        self, progress: Progress, tensors: Mapping[str, Mapping[str, Tensor]], is_pinned: bool
    ) -> None:
        """Make a step durable, as `RunState.save` does."""
        self._store.save(progress.step, _step_files(progress, tensors), is_pinned)


def _step_files(
    progress: Progress, tensors: Mapping[str, Mapping[str, Tensor]]
) -> dict[str, bytes]:
    files = {f"{name}.safetensors": save(dict(state)) for name, state in tensors.items()}
    return {**files, "progress.json": msgspec.json.encode(progress)}


def _remove(folder: Path) -> None:
    """Away at once: what a crash leaves of it has a name that nobody takes for a run's steps."""
    doomed = folder.with_name(f".{folder.name}{_DOOMED}")
    with explain_os_errors(f"remove {folder}"):
        if doomed.exists():
            shutil.rmtree(doomed)
        folder.rename(doomed)
        sync_folder(folder.parent)
        shutil.rmtree(doomed)
