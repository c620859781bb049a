"""How much of its rows an observer of a split run recovers: a short recorded run, a few attacks.

The run, the attacks and the score are those of `cutlayer audit`; this chooses a few that need no
training and little time. What it finds is a lower bound. It writes no report and no verdict.
"""

import time
from pathlib import Path

import cutlayer.audit.attacks  # noqa: F401 - registers them
from cutlayer.audit.audit import attack_names
from cutlayer.audit.grid import grid
from cutlayer.audit.material import make_bench
from cutlayer.audit.settings import AuditPlan, Phase
from cutlayer.audit.trial import run_trial
from cutlayer.client.settings import ClientSettings
from cutlayer.errors import DataError
from cutlayer.evaluation.published.task_files import TaskFolder
from cutlayer.settings import parse_settings
from cutlayer.storage.files import private_folder
from cutlayer.suite.compute import Compute
from cutlayer.suite.recipe import open_model
from cutlayer.suite.result import Figures
from cutlayer.suite.sides import Place, owner_settings
from cutlayer.suite.spec import RunSpec

__all__ = ["ATTACKS", "MAX_LENGTH", "NUM_ROWS", "SECONDS", "run_audited"]

ATTACKS = ("nearest_embedding", "vocabulary_matching")
"""On vectors that leave at the lower cut; none needs public text or a training of its own."""
NUM_ROWS = 2
"""Of the training rows, the first: so few that attacks end before their time does."""
MAX_LENGTH = 128
"""Tokens of a row, its last; so that no task's rows take longer."""
SECONDS = 240.0
"""Of all attacks together; what is unfinished then counts as it stands."""


def run_audited(
    spec: RunSpec, task: TaskFolder, folder: Path, compute: Compute, cache: Path | None
) -> Figures:
    """Record the first step of a run, and attack it knowing the public weights.

    Args:
        spec: the run.
        task: its training rows are attacked; all of their words count as private, those of the
            template too.
        folder: of the run's state.
        compute: threads and device of each side.
        cache: of assets and converted models; None is the usual one.

    Raises:
        DataError: no attack could run, and why.
        CutlayerError: whatever went wrong at either side.
    """
    place = Place(folder=private_folder(folder), model=open_model(spec, cache), compute=compute)
    owner, plan = _owner(spec, task, place), _plan(place)
    bench = make_bench(plan, owner, place.model, attack_names(plan.attacks))
    began_s = time.monotonic()
    trial = run_trial(grid(plan, owner)[0], bench, _watch_nothing)
    if trial.recovery is None:
        reasons = "; ".join(f"{one.attack}: {one.skipped}" for one in trial.attacks)
        raise DataError(f"run {spec.run_id}: no attack could run: {reasons}")
    return Figures(
        predictions=(),
        score_seconds=time.monotonic() - began_s,
        guarantee=trial.guarantee,
        recovery=trial.recovery,
    )


def _owner(spec: RunSpec, task: TaskFolder, place: Place) -> ClientSettings:
    """The run's own, with shorter rows."""
    owner = owner_settings(spec, task, place)
    length = min(MAX_LENGTH, int(place.model.config.max_position_embeddings))
    return owner.model_copy(update={"data": task.data_settings(length)})


def _plan(place: Place) -> AuditPlan:
    table = {
        # Settings are handed over; the plan's own name for their file is not read.
        "client": str(place.folder / "client.toml"),
        "folder": str(place.folder / "audit"),
        "phases": [Phase.BASE],
        "attacks": list(ATTACKS),
        "rows": NUM_ROWS,
        "min_tokens": 1,
        "canaries": 0,
        "seconds_per_setting": SECONDS,
        "public": None,
        "utility_rows": 0,
    }
    return parse_settings(AuditPlan, table, "the suite's audit")


def _watch_nothing(what: str, share: float) -> None:
    """Nobody watches."""
