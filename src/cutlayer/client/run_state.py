"""The owner's private folder of one run: id, saved steps, secret and ledger, audit log.

It does not train. What is saved: head and tail adapters, their optimizers, and `Progress`; the
ledger is apart and is never taken back.
"""

import secrets
from collections.abc import Mapping
from dataclasses import dataclass

import msgspec
from safetensors.torch import save
from torch import Tensor

from cutlayer.client.settings import RunSettings
from cutlayer.errors import ConfigError, StorageError
from cutlayer.model.tensor_file import read_tensors
from cutlayer.privacy.run_privacy import RunPrivacy, open_run_privacy
from cutlayer.storage.audit_log import AuditLog
from cutlayer.storage.files import private_folder, read_private, write_atomic
from cutlayer.storage.steps import StepStore
from cutlayer.storage.vault import open_run_vault, open_vault

__all__ = ["Progress", "RunState", "StepRecord"]


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
        self._run_file = self.folder / "run.json"
        self._known = self._read_known()
        self.run_id = self._known["run_id"]
        self.privacy: RunPrivacy = open_run_privacy(self.folder, self.run_id, self.vault)
        self.audit = AuditLog(self.folder / "audit.jsonl")
        self._steps = StepStore(self.folder / "steps", self.vault)

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
        files = {f"{name}.safetensors": save(dict(state)) for name, state in tensors.items()}
        files["progress.json"] = msgspec.json.encode(progress)
        self._steps.save(progress.step, files, is_pinned)

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

    def read_note(self, name: str) -> dict[str, str]:
        """A small private table kept beside the run; empty where there is none.

        Raises:
            StorageError: the file is damaged.
        """
        path = self.folder / name
        if not path.exists():
            return {}
        try:
            data = self.vault.open(read_private(path), name)
            return msgspec.json.decode(data, type=dict[str, str])
        except msgspec.DecodeError as error:
            raise StorageError(f"{path} is damaged; restore it from a copy") from error

    def write_note(self, name: str, table: Mapping[str, str]) -> None:
        """Keep a small private table, durably."""
        data = msgspec.json.encode(dict(table))
        write_atomic(self.folder / name, self.vault.seal(data, name))

    def claim(self, identity: Mapping[str, str]) -> None:
        """Fix what must not change within a run (adapter settings, data, cut), by name.

        Raises:
            ConfigError: the folder holds a run that was started with other values.
        """
        for name, value in identity.items():
            if self._known.get(name, value) != value:
                raise ConfigError(
                    f"{self.folder} holds a run that was started with other {name}; choose "
                    f"another run.folder or put the old {name} settings back"
                )
        if not identity.keys() <= self._known.keys():
            self._known = {**self._known, **identity}
            self._write_known()

    def _read_known(self) -> dict[str, str]:
        if not self._run_file.exists():
            self._known = {"run_id": secrets.token_hex(12)}
            self._write_known()
            return self._known
        return self.read_note(self._run_file.name)

    def _write_known(self) -> None:
        self.write_note(self._run_file.name, self._known)
