"""Several owners and a trunk server train on the same rows, shared out; one of them is scored.

Owners, server and rounds are the product's own, as threads over frames that are really encoded. It
shares out rows and adds up; who aggregates how is the federation's business.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from cutlayer.client.run_state import StepRecord
from cutlayer.errors import ConfigError
from cutlayer.evaluation.published.task_files import TaskFolder
from cutlayer.federation.settings import MIN_SECURE_COHORT, StrategySettings
from cutlayer.federation.strategy import STRATEGIES
from cutlayer.federation.trunk_pool import UpdateKind
from cutlayer.model.optimizer import AdamWSettings
from cutlayer.settings import parse_settings
from cutlayer.simulation.owners import OwnerRows
from cutlayer.simulation.parties import Owner, Parties, parties
from cutlayer.simulation.results import Training
from cutlayer.simulation.settings import SimulationSettings
from cutlayer.storage.files import explain_os_errors, private_folder, write_atomic
from cutlayer.suite.compute import Compute
from cutlayer.suite.recipe import CLIP_NORM, open_model, train_settings
from cutlayer.suite.result import Figures
from cutlayer.suite.sharing import rows_of_owners
from cutlayer.suite.sides import (
    Answers,
    Place,
    answers,
    check_test,
    history_of,
    loopback_world,
    owner_table,
)
from cutlayer.suite.spec import RunSpec

__all__ = ["federation_table", "run_together"]

_KIND = "together"


def run_together(
    spec: RunSpec, task: TaskFolder, folder: Path, compute: Compute, cache: Path | None
) -> Figures:
    """Train and score.

    Args:
        spec: the run.
        task: rows to share out, and rows to score.
        folder: rows and state of all sides go below it.
        compute: threads and device of each side.
        cache: of assets and converted models; None is the usual one.

    Raises:
        ConfigError: rows of a step or steps of a run cannot be shared out evenly.
        DataError: an owner would have too few rows.
        CutlayerError: whatever went wrong at any party.
    """
    _check(spec)
    check_test(task)
    place = Place(folder=private_folder(folder), model=open_model(spec, cache), compute=compute)
    everybody = _parties(spec, task, place)
    trained, num_bytes, scored = _run(everybody, task)
    return Figures(
        predictions=scored.predictions,
        losses=_losses(everybody.owners),
        train_seconds=max(training.seconds for training in trained),
        score_seconds=scored.seconds,
        num_train_tokens=sum(training.num_tokens for training in trained),
        bytes_up=num_bytes[0],
        bytes_down=num_bytes[1],
        guarantee=trained[0].guarantee,
    )


def federation_table(spec: RunSpec) -> dict[str, object]:
    """The federation of a run: as many gradients or local steps as the run has steps.

    Updates are masked wherever the strategy needs no single ones and three owners hide each other.
    """
    strategy = STRATEGIES.get(spec.strategy)
    takes_gradient = strategy.sends is UpdateKind.GRADIENT
    is_secure = spec.owners >= MIN_SECURE_COHORT and not strategy.needs_single_updates
    return {
        "name": "suite",
        "rounds": spec.sizes.steps // spec.local_steps,
        "local_steps": spec.local_steps,
        "strategy": _gradient_strategy(spec) if takes_gradient else _change_strategy(spec),
        "secure": {"enabled": is_secure},
    }


def _check(spec: RunSpec) -> None:
    sizes = spec.sizes
    if spec.in_processes:
        raise ConfigError("in_processes measures one owner's memory; take method split for it")
    if spec.owners < 2:
        raise ConfigError(f"owners={spec.owners}: together are two or more; else take method split")
    if sizes.rows_per_step % spec.owners:
        raise ConfigError(
            f"rows_per_step={sizes.rows_per_step} cannot be shared out evenly among {spec.owners} "
            "owners; take a multiple of them"
        )
    takes_gradient = STRATEGIES.get(spec.strategy).sends is UpdateKind.GRADIENT
    if takes_gradient and spec.local_steps != 1:
        raise ConfigError(
            f"strategy {spec.strategy} takes one gradient a round; local_steps is 1, "
            f"not {spec.local_steps}"
        )
    if sizes.steps % spec.local_steps:
        raise ConfigError(
            f"steps={sizes.steps} are no whole rounds of local_steps={spec.local_steps}; "
            "take a multiple of them"
        )


def _gradient_strategy(spec: RunSpec) -> dict[str, object]:
    """The server takes the step that a lone owner's optimizer takes."""
    adamw = AdamWSettings().model_dump()
    return {"kind": spec.strategy, "lr": spec.sizes.lr, "clip_norm": CLIP_NORM, **adamw}


def _change_strategy(spec: RunSpec) -> dict[str, object]:
    """Owners step as a lone one does; what the strategy adds has its own defaults."""
    return StrategySettings(kind=spec.strategy).model_dump(exclude_unset=True)


def _parties(spec: RunSpec, task: TaskFolder, place: Place) -> Parties:
    settings = _settings(spec, task, place)
    rows = _shared_out(spec, task, settings, place.folder / "rows")
    everybody = parties(settings, place.model.path, rows, place.folder)
    if spec.owners >= MIN_SECURE_COHORT:
        return everybody
    return replace(everybody, owners=[_as_one_of_two(owner) for owner in everybody.owners])


def _as_one_of_two(owner: Owner) -> Owner:
    """Two cannot hide from each other whatever is done: each agrees to be one of so few."""
    membership = owner.together.federation
    assert membership is not None
    few = membership.model_copy(update={"min_cohort": 2})
    return replace(owner, together=owner.together.model_copy(update={"federation": few}))


def _settings(spec: RunSpec, task: TaskFolder, place: Place) -> SimulationSettings:
    own = owner_table(spec, task, place)
    train = train_settings(spec).model_dump(exclude={"steps", "epochs"})
    own_rows = spec.sizes.rows_per_step // spec.owners
    train |= {
        "rows_per_step": own_rows,
        "micro_batch_rows": min(spec.sizes.micro_batch_rows, own_rows),
    }
    table = {
        **{name: own[name] for name in ("model", "privacy", "adapter", "data")},
        "simulation": {"owners": spec.owners, "seed": spec.seed},
        "connection": {"codec": spec.codec},
        "federation": federation_table(spec),
        "train": train,
    }
    return parse_settings(SimulationSettings, table, f"run {spec.run_id}")


def _shared_out(
    spec: RunSpec, task: TaskFolder, settings: SimulationSettings, folder: Path
) -> list[OwnerRows]:
    """Files of the owners' rows."""
    lines = task.train.read_bytes().splitlines(keepends=True)
    return [
        _own_rows(f"owner-{number}", [lines[row] for row in part], settings, folder)
        for number, part in enumerate(rows_of_owners(spec, task), 1)
    ]


def _own_rows(
    name: str, lines: Sequence[bytes], settings: SimulationSettings, folder: Path
) -> OwnerRows:
    assert settings.data is not None
    path = folder / f"{name}.jsonl"
    with explain_os_errors(f"create folder {folder}"):
        folder.mkdir(parents=True, exist_ok=True)
    write_atomic(path, lines)
    return OwnerRows(name=name, data=settings.data.model_copy(update={"train": path}))


def _run(everybody: Parties, task: TaskFolder) -> tuple[list[Training], tuple[int, int], Answers]:
    """Train all at once; any owner has the common adapters then, so the first answers."""
    owners = {owner.name: owner.together for owner in everybody.owners}
    first = next(iter(owners))
    with loopback_world(everybody.server) as world:
        trained = world.train(owners, _KIND)
        num_bytes = world.num_bytes
        with world.clients({first: owners[first]}) as clients:
            scored = answers(clients[first], task)
    return list(trained.values()), num_bytes, scored


def _losses(owners: Sequence[Owner]) -> tuple[float, ...]:
    histories = [history_of(owner.together.run) for owner in owners]
    return tuple(_mean_loss(records) for records in zip(*histories, strict=True))


def _mean_loss(records: Sequence[StepRecord]) -> float:
    """Over the scored tokens of one step, all owners' together."""
    num_scored = sum(record.num_scored for record in records)
    return sum(record.loss * record.num_scored for record in records) / max(1, num_scored)
