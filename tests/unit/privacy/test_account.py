"""Budgets in epsilon: per run, day and for ever; no file can be lost, cut or edited unseen."""

import math
import shutil
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import torch

from cutlayer.errors import BudgetExceeded, ConfigError, StorageError
from cutlayer.model.rows import Rows
from cutlayer.privacy.account import OwnerAccount
from cutlayer.privacy.boundary import Boundary, BoundaryName, Released
from cutlayer.privacy.budget import BudgetScope, EpsilonBudgetSettings
from cutlayer.privacy.epsilon import rdp_epsilon
from cutlayer.privacy.guarantee import PrivacyUnit
from cutlayer.privacy.ledger import Ledger
from cutlayer.privacy.mechanism import MECHANISMS, PrivacySettings
from cutlayer.privacy.noise import RunSecret
from cutlayer.privacy.spent import Spent
from cutlayer.settings import parse_settings
from cutlayer.storage.log import DurableLog, read_log
from cutlayer.wire.codec import get_codec

Z, LENGTH, WIDTH, DELTA = 20.0, 3, 4, 1e-5
ONE_ROW = Spent(gaussian=LENGTH * 4 / Z**2)
"""What a row of three vectors costs each time."""
ACTIVATIONS, GENERATION = BoundaryName.ACTIVATIONS, BoundaryName.GENERATION


class Run:
    """One run of an owner; `restart` opens its files anew."""

    def __init__(
        self,
        folder: Path,
        name: str,
        budget: EpsilonBudgetSettings,
        shared: tuple[str, ...] = (),
        mechanism: str = "clipped_gaussian",
    ) -> None:
        self.now = datetime(2026, 11, 21, 12, tzinfo=UTC)
        self.folder, self.name, self.budget = folder / name, name, budget
        self.path, self._shared = folder / "account.jsonl", frozenset(shared)
        scale, clip = (Z, 1.0) if mechanism == "clipped_gaussian" else (0.02, None)
        self._rule, self._secret = MECHANISMS.make(mechanism, scale, clip), RunSecret.new()
        self._ledger: Ledger | None = None
        self.restart()

    def restart(self) -> None:
        self.close()
        self.folder.mkdir(parents=True, exist_ok=True)
        self._ledger = Ledger(
            DurableLog(self.folder / "ledger.jsonl"), self.name, now=lambda: self.now
        )
        self.account = OwnerAccount(self.path, self.budget, self._shared)
        self._ledger.guarded_by(self.account)

    def close(self) -> None:
        if self._ledger is not None:
            self._ledger.close()

    @property
    def ledger(self) -> Ledger:
        assert self._ledger is not None
        return self._ledger

    def release(
        self, *rows: str, version: str = "frozen", boundary: BoundaryName = ACTIVATIONS
    ) -> Released:
        gate = Boundary(boundary, self._rule, get_codec("raw"), self.ledger, self._secret)
        seed = sum(map(ord, version + "".join(rows)))
        x_ND = torch.randn(LENGTH * len(rows), WIDTH, generator=torch.Generator().manual_seed(seed))
        layout = Rows(lengths=(LENGTH,) * len(rows))
        return gate.release(x_ND, layout, rows, version)[1]

    def spent(self, scope: BudgetScope = BudgetScope.FOREVER) -> Spent:
        return self.account.spent(scope, self.name, self.now.date().isoformat())


Open = Callable[..., Run]


@pytest.fixture
def open_run(tmp_path: Path) -> Iterator[Open]:
    runs: list[Run] = []

    def open_(name: str = "run-1", shared: tuple[str, ...] = (), **limits: object) -> Run:
        mechanism = str(limits.pop("mechanism", "clipped_gaussian"))
        budget = EpsilonBudgetSettings.model_validate(limits)
        runs.append(Run(tmp_path, name, budget, shared, mechanism))
        return runs[-1]

    yield open_
    for run in runs:
        run.close()


def room(times: int) -> float:
    """A limit that has room for one row so many times and not once more."""
    return rdp_epsilon(ONE_ROW.times(times), DELTA) * 1.0001


def gaussian(run: Run, scope: BudgetScope = BudgetScope.FOREVER) -> float:
    """What is spent, in rows."""
    return round(run.spent(scope).gaussian / ONE_ROW.gaussian, 9)


def test_a_run_stops_before_the_release_that_would_be_too_much(open_run: Open):
    run = open_run(run_epsilon=room(2))
    run.release("a", version="step0")
    run.release("a", version="step1")
    before = (run.folder / "ledger.jsonl").read_bytes(), run.path.read_bytes()
    for _ in range(2):
        with pytest.raises(BudgetExceeded, match=r"epsilon per row .* left .*run_epsilon.*stop he"):
            run.release("a", version="step2")
    assert before == ((run.folder / "ledger.jsonl").read_bytes(), run.path.read_bytes())


def test_rows_of_a_frozen_head_each_have_their_own_budget_and_replays_cost_nothing(open_run: Open):
    run = open_run(run_epsilon=room(1))
    for name in "abcd":
        run.release(name)
        assert run.release(name).is_replay
    assert gaussian(run) == 1
    with pytest.raises(BudgetExceeded):
        run.release("a", version="other")


def test_with_a_head_that_trains_every_release_counts_for_every_row(open_run: Open):
    run = open_run(shared=("activations",), run_epsilon=room(2))
    run.release("a", version="step0")
    run.release("b", version="step0")
    with pytest.raises(BudgetExceeded):
        run.release("c", version="step1")


@pytest.mark.parametrize(("unit", "rows"), [("token vector", 2 / 3), ("row", 2), ("client", 4)])
def test_the_unit_says_whose_releases_add_up(open_run: Open, unit: str, rows: float):
    run = open_run(unit=unit)
    for version in ("step0", "step1"):
        run.release("a", "b", version=version)
    assert gaussian(run) == pytest.approx(rows)


def test_conversations_are_not_told_apart_but_a_vector_is_new_once_a_version(open_run: Open):
    by_row, by_vector = open_run("run-1"), open_run("run-2", unit="token vector")
    for run in (by_row, by_vector):
        for version in ("base", "step1"):
            for name in "abc":
                run.release(name, version=version, boundary=GENERATION)
    assert gaussian(by_row, BudgetScope.RUN) == 6
    assert gaussian(by_vector, BudgetScope.RUN) == pytest.approx(2 / 3)


def test_a_restart_remembers_and_so_does_the_account_when_the_run_is_gone(open_run: Open):
    first = open_run("run-1", forever_epsilon=room(3))
    for version in ("step0", "step1"):
        first.release("a", version=version)
    first.restart()
    assert gaussian(first) == 2
    first.close()
    shutil.rmtree(first.folder)
    second = open_run("run-2", forever_epsilon=room(3))
    second.release("a")
    with pytest.raises(BudgetExceeded, match="forever_epsilon"):
        second.release("a", version="step1")


def test_a_days_budget_opens_again_and_a_clock_set_back_does_not_open_it(open_run: Open):
    run = open_run(day_epsilon=room(1))
    run.release("a", version="step0")
    with pytest.raises(BudgetExceeded, match="wait for the next UTC day"):
        run.release("a", version="step1")
    run.now += timedelta(days=1)
    run.restart()
    run.release("a", version="step1")
    run.now -= timedelta(days=1)
    with pytest.raises(BudgetExceeded):
        run.release("a", version="step2")


def test_runs_that_write_at_the_same_time_share_one_budget(open_run: Open):
    limit = room(20)
    runs = [open_run(f"run-{n}", shared=("activations",), forever_epsilon=limit) for n in range(4)]

    def work(run: Run) -> int:
        for number in range(20):
            try:
                run.release("a", version=f"step{number}")
            except BudgetExceeded:
                return number
        return 20

    with ThreadPoolExecutor(4) as pool:
        done = list(pool.map(work, runs))
    assert sum(done) == 20
    assert len(list(read_log(runs[0].path))) == 20
    assert rdp_epsilon(runs[0].spent(), DELTA) <= limit


def test_a_run_older_than_the_account_is_counted_from_its_ledger(open_run: Open, tmp_path: Path):
    run = open_run("run-1")
    run.release("a")
    run.close()
    lines = (run.folder / "ledger.jsonl").read_text()
    assert '"account":' in lines
    with Ledger(DurableLog(tmp_path / "alone.jsonl"), "run-9") as ledger:
        gate = Boundary(ACTIVATIONS, run._rule, get_codec("raw"), ledger, RunSecret.new())
        gate.release(torch.ones(LENGTH, WIDTH), Rows(lengths=(LENGTH,)), ["a"], "frozen")
        ledger.guarded_by(run.account)
    assert gaussian(run) == 2


@pytest.mark.parametrize("damage", ["removed", "cut", "edited", "replaced"])
@pytest.mark.parametrize("name", ["account.jsonl", "run-1/ledger.jsonl"])
def test_a_damaged_file_stops_the_run(open_run: Open, tmp_path: Path, name: str, damage: str):
    run = open_run(forever_epsilon=100.0)
    for number in range(4):
        run.release("a", version=f"step{number}")
    run.close()
    path = tmp_path / name
    lines = path.read_text().splitlines(keepends=True)
    if damage == "removed":
        path.unlink()
    elif damage == "cut":
        path.write_text("".join(lines[:2]))
    elif damage == "edited":
        path.write_text("".join(lines).replace("step1", "step7").replace("0.03", "0.01"))
    else:
        other = Run(tmp_path / "elsewhere", "run-1", run.budget)
        for number in range(5):
            other.release("b", version=f"step{number}")
        other.close()
        shutil.copyfile(tmp_path / "elsewhere" / name, path)
    with pytest.raises(StorageError, match=r"put the original|restore the file"):
        run.restart()


def test_an_account_cut_back_while_it_is_in_use_stops_the_next_release(open_run: Open):
    run = open_run()
    run.release("a", version="step0")
    run.release("a", version="step1")
    lines = run.path.read_text().splitlines(keepends=True)
    run.path.write_text(lines[0])
    with pytest.raises(StorageError, match="cut back or replaced"):
        run.release("a", version="step2")
    assert run.ledger.summary().num_lines == 2


def test_a_writer_that_died_in_the_middle_of_a_line_does_no_harm(open_run: Open):
    run = open_run()
    run.release("a", version="step0")
    with run.path.open("ab") as file:
        file.write(b'{"n":1,"prev"')
    run.release("a", version="step1")
    run.restart()
    assert gaussian(run) == 2


def test_a_crash_between_account_and_ledger_leaves_the_release_counted(open_run: Open):
    run = open_run("run-1", run_epsilon=room(1))
    run.release("a", version="step0")
    account, ledger = run.path.read_bytes(), run.folder / "ledger.jsonl"
    run.close()
    ledger.write_text("")
    run.restart()
    assert run.path.read_bytes() == account
    assert gaussian(run) == 1
    with pytest.raises(BudgetExceeded):
        run.release("a", version="step1")


def test_a_budget_in_epsilon_needs_a_rule_that_has_one(open_run: Open):
    table = {"mechanism": "gaussian", "scale": 0.02, "budget": {"run_epsilon": 8.0}}
    with pytest.raises(ConfigError, match=r"mechanism gaussian has none.*unclipped"):
        parse_settings(PrivacySettings, table, where="run.toml")
    free = {**table, "budget": {"run_epsilon": 8.0, "boundaries": ["gradients"]}}
    assert parse_settings(PrivacySettings, free, where="run.toml").budget.run_epsilon == 8.0
    run = open_run(mechanism="gaussian", run_epsilon=8.0)
    with pytest.raises(ConfigError, match=r"releases without a guarantee \(activations of run"):
        run.release("a")
    assert run.ledger.summary().num_lines == 0
    assert not run.path.read_bytes()


def test_what_another_run_released_without_noise_forbids_a_budget_for_ever(open_run: Open):
    plain = open_run("plain", mechanism="gaussian")
    plain.release("a")
    run = open_run("run-1", run_epsilon=8.0)
    run.release("a")
    careful = open_run("run-2", forever_epsilon=8.0)
    with pytest.raises(ConfigError, match="activations of run plain"):
        careful.release("a")


@pytest.mark.parametrize("value", [0, -1, math.inf, math.nan, "much"])
def test_a_limit_that_is_none_is_refused(value: object):
    with pytest.raises(ConfigError, match=r"budget\.run_epsilon"):
        parse_settings(
            PrivacySettings,
            {"mechanism": "clipped_gaussian", "scale": 1.0, "clip": 1.0}
            | {"budget": {"run_epsilon": value}},
            "t",
        )


def test_budgets_may_change_and_the_noise_keeps_its_digest():
    plain = PrivacySettings(mechanism="clipped_gaussian", scale=1.0, clip=2.0)
    budget = EpsilonBudgetSettings(run_epsilon=1.0, unit=PrivacyUnit.CLIENT)
    limited = plain.model_copy(update={"budget": budget, "account_file": Path("a")})
    assert plain.noise() == limited.noise()


def test_asking_the_account_costs_well_under_a_millisecond_of_work(open_run: Open):
    run = open_run(shared=("activations",), run_epsilon=1e6, forever_epsilon=1e6)
    for number in range(20):
        run.release("a", version=f"warm{number}")
    began_s, count = time.process_time(), 200
    for number in range(count):
        run.release("a", version=f"step{number}")
    assert (time.process_time() - began_s) / count < 3e-3
