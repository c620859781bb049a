"""Several owners: equal to one where they should be, and refused where rows cannot be shared."""

from collections import Counter
from pathlib import Path

import msgspec
import pytest

from cutlayer.data.sources import read_records
from cutlayer.errors import ConfigError, DataError
from cutlayer.evaluation.published.task_files import TaskFolder
from cutlayer.federation.settings import FederationSettings
from cutlayer.federation.strategy import STRATEGIES
from cutlayer.settings import parse_settings
from cutlayer.suite.central import run_central
from cutlayer.suite.result import Figures
from cutlayer.suite.spec import Method, RunSpec
from cutlayer.suite.split import run_split
from cutlayer.suite.together import federation_table, run_together
from tests.unit.suite.tiny_tasks import ONE_THREAD, SIZES, tiny_spec, tiny_task

ALL_ROWS = {"rows_per_step": 24, "micro_batch_rows": 12}
"""Every row in every step: it does not matter then who has which."""


@pytest.fixture
def spec(model: Path) -> RunSpec:
    return tiny_spec(model, Method.TOGETHER, owners=4)


def labels_of(folder: Path) -> list[Counter[str]]:
    files = sorted((folder / "rows").glob("owner-*.jsonl"))
    return [Counter(str(r.value("label")) for r in read_records(file, "jsonl")) for file in files]


@pytest.fixture(scope="module")
def alone(model: Path, task: TaskFolder, tmp_path_factory: pytest.TempPathFactory) -> Figures:
    spec = tiny_spec(model, Method.SPLIT, **ALL_ROWS)
    return run_split(spec, task, tmp_path_factory.mktemp("alone") / "work", ONE_THREAD, None)


def test_four_owners_with_every_step_learn_as_one_with_all_rows(
    model: Path, task: TaskFolder, tmp_path: Path, alone: Figures
) -> None:
    spec = tiny_spec(model, Method.TOGETHER, owners=4, **ALL_ROWS)
    figures = run_together(spec, task, tmp_path / "work", ONE_THREAD, None)
    assert figures.losses == pytest.approx(alone.losses, rel=1e-4)
    for ours, theirs in zip(figures.predictions, alone.predictions, strict=True):
        assert ours.log_likelihoods == pytest.approx(theirs.log_likelihoods, abs=1e-2)
    assert figures.num_train_tokens == alone.num_train_tokens
    assert figures.guarantee == alone.guarantee


def test_owners_with_every_step_equal_unsplit_training_on_the_rows_of_each_step(
    model: Path, task: TaskFolder, tmp_path: Path
) -> None:
    spec = tiny_spec(model, Method.TOGETHER, owners=4, steps=6)
    together = run_together(spec, task, tmp_path / "together", ONE_THREAD, None)
    twin = msgspec.structs.replace(spec, method=Method.CENTRALISED)
    central = run_central(twin, task, tmp_path / "twin", ONE_THREAD, None)
    alone = msgspec.structs.replace(twin, owners=1)
    other = run_central(alone, task, tmp_path / "alone", ONE_THREAD, None)
    assert together.losses == pytest.approx(central.losses, rel=1e-4)
    assert together.num_train_tokens == central.num_train_tokens
    assert together.losses != pytest.approx(other.losses, rel=1e-3)


def test_updates_count_as_bytes(
    model: Path, task: TaskFolder, tmp_path: Path, alone: Figures
) -> None:
    spec = tiny_spec(model, Method.TOGETHER, owners=3, rows_per_step=24)
    figures = run_together(spec, task, tmp_path / "work", ONE_THREAD, None)
    assert figures.bytes_up > 2 * alone.bytes_up


def test_rounds_of_local_steps_have_a_loss_for_each_step(
    spec: RunSpec, task: TaskFolder, tmp_path: Path
) -> None:
    rounds = msgspec.structs.replace(spec, strategy="fedavg", local_steps=2)
    figures = run_together(rounds, task, tmp_path / "work", ONE_THREAD, None)
    assert len(figures.losses) == SIZES.steps
    assert figures.losses[-1] < figures.losses[0]
    assert len(figures.predictions) == 4


def test_skewed_owners_have_other_shares_of_labels(
    spec: RunSpec, task: TaskFolder, tmp_path: Path
) -> None:
    skewed = msgspec.structs.replace(spec, alpha=0.1, owners=2)
    run_together(skewed, task, tmp_path / "skewed", ONE_THREAD, None)
    first, second = labels_of(tmp_path / "skewed")
    assert first.total() == second.total() == 12
    assert abs(first["entailment"] - second["entailment"]) >= 6


def test_every_strategy_has_a_federation_that_may_be(spec: RunSpec) -> None:
    for name in STRATEGIES:
        table = federation_table(msgspec.structs.replace(spec, strategy=name))
        settings = parse_settings(FederationSettings, table, name)
        assert settings.strategy.kind == name
        assert settings.secure.enabled is not STRATEGIES.get(name).needs_single_updates


def test_a_strategy_that_sees_single_updates_trains_too(
    spec: RunSpec, task: TaskFolder, tmp_path: Path
) -> None:
    median = msgspec.structs.replace(spec, strategy="median", local_steps=2)
    figures = run_together(median, task, tmp_path / "work", ONE_THREAD, None)
    assert figures.losses[-1] < figures.losses[0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"owners": 3}, "rows_per_step=8"),
        ({"owners": 1}, "method split"),
        ({"local_steps": 2}, "one gradient a round"),
        ({"strategy": "fedavg", "local_steps": 3}, "no whole rounds"),
        ({"strategy": "fedbest"}, "no strategy"),
        ({"in_processes": True}, "method split"),
        ({"alpha": -1.0}, "alpha"),
        ({"strategy": "svd", "adapter": "prefix"}, "LoRA"),
    ],
)
def test_what_cannot_be_shared_out_is_refused_before_work(
    spec: RunSpec, task: TaskFolder, tmp_path: Path, changes: dict[str, object], message: str
) -> None:
    wrong = msgspec.structs.replace(spec, **changes)
    with pytest.raises(ConfigError, match=message):
        run_together(wrong, task, tmp_path / "work", ONE_THREAD, None)
    assert not (tmp_path / "work" / "runs").exists()


def test_more_owners_than_rows_are_refused(spec: RunSpec, tmp_path: Path) -> None:
    few = tiny_task(tmp_path / "task", num_train=5)
    with pytest.raises(DataError, match="fewer owners or more rows"):
        run_together(spec, few, tmp_path / "work", ONE_THREAD, None)
