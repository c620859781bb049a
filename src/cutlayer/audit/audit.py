"""An audit from settings to report: every setting of the grid, or a search among them.

It goes on from the trials that its folder has. A trial is in `trial`, the page in `report`.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Protocol

import msgspec

import cutlayer.audit.attacks  # noqa: F401 - registers them
from cutlayer.audit.attack import ATTACKS
from cutlayer.audit.grid import TrialSpec, grid
from cutlayer.audit.material import make_bench, resolve
from cutlayer.audit.plots import require_pictures, utility_of
from cutlayer.audit.report import About, write_report
from cutlayer.audit.results import Store, Trial
from cutlayer.audit.search import Answer, Tried, search
from cutlayer.audit.settings import AuditPlan
from cutlayer.audit.trial import Bench, run_trial
from cutlayer.audit.verdict import save_verdict, verdicts_folder
from cutlayer.client.local_run import on_this_machine
from cutlayer.client.settings import ClientSettings
from cutlayer.data.load import dataset_digest
from cutlayer.errors import ConfigError
from cutlayer.settings import load_settings
from cutlayer.storage.files import explain_os_errors

__all__ = ["Audit", "Outcome", "Watcher", "attack_names"]

TRIED_FILE = "search.jsonl"


class Watcher(Protocol):
    """Whoever shows how far an audit is."""

    def begin(self, number: int, total: int | None, label: str) -> None:
        """A setting is begun."""

    def progress(self, what: str, share: float) -> None:
        """Within the setting: what goes on, and how far that is."""

    def finish(self, trial: Trial, was_done: bool) -> None:
        """A setting is done, now or in an earlier audit."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What an audit leaves."""

    trials: list[Trial]
    files: list[Path]
    """Report, values, pictures."""
    answer: Answer | None = None
    """Of a search."""


class Audit:
    """One audit, prepared: everything that can be wrong with its settings has been."""

    def __init__(self, plan: AuditPlan, watcher: Watcher) -> None:
        """Read rows and model, and open the folder.

        Raises:
            ConfigError: unknown names, no rows, or a package is missing.
            StorageError: the folder is of another audit.
        """
        require_pictures()
        self._plan, self._watcher = plan, watcher
        names = attack_names(plan.attacks)
        client = load_settings(ClientSettings, plan.client)
        model = resolve(client.model.path, client.model.revision)
        # Named as the owner does: the resolved folder of a converted model is a hash.
        self._about = _about(client, plan)
        client = on_this_machine(client, model.path)
        self.specs = grid(plan, client)
        self._check_cuts(model.config.num_hidden_layers)
        self._bench = make_bench(plan, client, model, names)
        self._store = Store(plan.folder.absolute(), _identity(self._bench, client))

    def run(self) -> Outcome:
        """Every setting of the grid, then the report."""
        trials = []
        for number, spec in enumerate(self.specs, 1):
            trials.append(self._trial(spec, number, len(self.specs)))
            # A report after every setting: an audit that is stopped has shown what it has.
            files = write_report(trials, self._about, self._plan.folder)
        return Outcome(trials=trials, files=files)

    def search(self, target: float) -> Outcome:
        """Look for the best setting; every one that was tried is in search.jsonl.

        Args:
            target: recovery that is still accepted, 0 to 1.
        """
        if not 0 <= target < 1:
            raise ConfigError(f"--target-recovery {target} is no share; use 0 to 1, such as 0.1")
        if not self._plan.utility_rows or not self._bench.material.heldout:
            raise ConfigError(
                "a search compares utility: set audit.utility_rows above 0, and data.validation or "
                "data.validation_fraction in the client's settings"
            )
        trials: list[Trial] = []

        def run(spec: TrialSpec) -> Tried:
            trial = self._trial(spec, len(trials) + 1, None)
            trials.append(trial)
            tried = Tried(spec=spec, recovery=trial.recovery, utility=utility_of(trial))
            self._note(tried)
            return tried

        answer = search(self.specs, target, self._plan.search, run)
        files = write_report(trials, self._about, self._plan.folder)
        return Outcome(trials=trials, files=files, answer=answer)

    def _trial(self, spec: TrialSpec, number: int, total: int | None) -> Trial:
        trial = self._store.load(spec)
        was_done = trial is not None
        if trial is None:
            self._watcher.begin(number, total, spec.label)
            trial = run_trial(spec, self._bench, self._watcher.progress)
            self._store.save(trial)
        save_verdict(trial, verdicts_folder(self._plan.verdicts))
        self._watcher.finish(trial, was_done)
        return trial

    def _note(self, tried: Tried) -> None:
        path = self._plan.folder / TRIED_FILE
        with explain_os_errors(f"write {path}"), path.open("ab") as file:
            file.write(msgspec.json.encode(tried) + b"\n")

    def _check_cuts(self, num_blocks: int) -> None:
        for spec in self.specs:
            if spec.upper > num_blocks:
                raise ConfigError(
                    f"{spec.label}: the model has {num_blocks} blocks; a cut ends at that at most"
                )


def attack_names(wanted: Sequence[str]) -> list[str]:
    """Registered names; all where none is wanted.

    Raises:
        ConfigError: a name is unknown, or there is no attack at all.
    """
    for name in wanted:
        ATTACKS.make(name)
    names = list(dict.fromkeys(wanted)) or list(ATTACKS.names)
    if not names:
        raise ConfigError("no attack is registered; this installation is incomplete")
    return names


def _identity(bench: Bench, client: ClientSettings) -> str:
    """Hash of what all trials have in common; the grid may grow."""
    material = bench.material
    shared = {"threat", "passes", "train_steps", "seconds_per_setting", "seed", "show_examples"}
    sections = {"adapter", "data", "train", "connection"}
    dtype = client.model.trunk_weights.told(client.model.dtype)
    facts: dict[str, object] = {
        "client": client.model_dump(mode="json", include=sections),
        "model": [str(client.model.path), dtype],
        "gradients": client.privacy.gradient_rule().label,
        "rows": dataset_digest([*material.rows, *material.heldout]),
        "public": _digest([list(row) for row in bench.public_rows]),
        "names": list(bench.names),
        "plan": material.plan.model_dump(mode="json", include=shared),
    }
    if client.privacy.denoiser:
        facts["denoiser"] = True
    if bench.planted is not None:
        facts["planted"] = len(bench.planted.rows)
    return _digest(facts)


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _about(client: ClientSettings, plan: AuditPlan) -> About:
    data = client.data
    rows = "" if data is None else f", rows of {data.train.name}"
    today = datetime.now(UTC).date().isoformat()
    return About(
        title=f"{Path(client.model.path).name}{rows}",
        made=f"Made by cutlayer {version('cutlayer')} on {today}.",
        min_tokens=plan.min_tokens,
    )
