"""Budgets of generation: exact, free of replays, kept over restarts, all of a call or nothing."""

import threading
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path

import pytest
import torch

from cutlayer.client.own_model import run_identity
from cutlayer.client.settings import TrainSettings
from cutlayer.errors import BudgetExceeded, ConfigError, StorageError
from cutlayer.model.rows import Rows
from cutlayer.privacy.boundary import Boundary, BoundaryName, Released
from cutlayer.privacy.budget import SessionBudget
from cutlayer.privacy.ledger import Ledger
from cutlayer.privacy.mechanism import MECHANISMS, PrivacySettings
from cutlayer.privacy.noise import RunSecret
from cutlayer.settings import parse_settings, settings_digest
from cutlayer.storage.log import DurableLog
from cutlayer.wire.codec import get_codec
from tests.worlds import client_settings

WIDTH = 8
SECRET = RunSecret.new()
GENERATION, ACTIVATIONS = BoundaryName.GENERATION, BoundaryName.ACTIVATIONS


class Clock:
    """A day that the test turns."""

    def __init__(self) -> None:
        self.now = datetime(2026, 11, 21, 23, 59, 59, tzinfo=UTC)

    def __call__(self) -> datetime:
        return self.now


class Owner:
    """A ledger in a file, opened anew by `restart`, and its gates."""

    def __init__(self, path: Path, day_limit: int | None = None) -> None:
        self.clock, self._path, self._day_limit = Clock(), path, day_limit
        self.restart()

    def restart(self) -> None:
        if hasattr(self, "ledger"):
            self.ledger.close()
        self.ledger = Ledger(DurableLog(self._path), "run-1", now=self.clock)

    def gate(self, name: BoundaryName = GENERATION) -> Boundary:
        limit = self._day_limit if name is GENERATION else None
        rule, codec = MECHANISMS.make("gaussian", 0.02), get_codec("raw")
        return Boundary(name, rule, codec, self.ledger, SECRET, limit)

    def release(
        self, lengths: list[int], ids: list[str], *budgets: SessionBudget, gate: Boundary | None
    ) -> Released:
        h_ND = torch.arange(float(sum(lengths) * WIDTH)).reshape(-1, WIDTH)
        return (gate or self.gate()).release(
            h_ND, Rows(lengths=tuple(lengths)), ids, "base", budgets
        )[1]

    def say(self, length: int, name: str, *budgets: SessionBudget) -> Released:
        """One row of one conversation."""
        return self.release([length], [name], *budgets, gate=None)

    @property
    def num_released(self) -> int:
        return self.ledger.summary().num_vectors.get("generation", 0)


Open = Callable[[int | None], Owner]


@pytest.fixture
def open_owner(tmp_path: Path) -> Iterator[Open]:
    owners: list[Owner] = []

    def open_(day_limit: int | None) -> Owner:
        owners.append(Owner(tmp_path / "ledger.jsonl", day_limit))
        return owners[-1]

    yield open_
    for owner in owners:
        owner.ledger.close()


def test_a_conversation_may_release_to_its_very_limit_and_no_vector_more(open_owner: Open):
    owner, budget = open_owner(None), SessionBudget(10)
    owner.say(7, "a", budget)
    with pytest.raises(BudgetExceeded, match=r"4 more vectors and has 3 of 10 left.*new conversa"):
        owner.say(4, "b", budget)
    assert (budget.num_spent, budget.num_left, owner.num_released) == (7, 3, 7)
    owner.say(3, "c", budget)
    with pytest.raises(BudgetExceeded, match="1 more vectors and has 0 of 10 left"):
        owner.say(1, "d", budget)
    assert (budget.num_left, owner.num_released) == (0, 10)


def test_another_conversation_has_its_own_budget(open_owner: Open):
    owner = open_owner(None)
    owner.say(5, "a", SessionBudget(5))
    owner.say(5, "b", SessionBudget(5))
    assert owner.num_released == 10


def test_without_a_limit_a_conversation_is_counted_all_the_same(open_owner: Open):
    owner, budget = open_owner(None), SessionBudget()
    owner.say(9, "a", budget)
    assert (budget.num_spent, budget.num_left) == (9, None)


def test_a_conversation_that_goes_on_from_more_than_its_limit_has_nothing_left(open_owner: Open):
    owner, budget = open_owner(None), SessionBudget(10)
    budget.spend(12)
    with pytest.raises(BudgetExceeded, match="has 0 of 10 left"):
        owner.say(1, "a", budget)


def test_what_is_refused_is_neither_written_nor_noised(open_owner: Open, tmp_path: Path):
    owner, budget = open_owner(None), SessionBudget(5)
    owner.say(5, "a", budget)
    gate, before = owner.gate(), (tmp_path / "ledger.jsonl").read_bytes()
    noised = []
    plain = gate.mechanism.apply
    gate.mechanism.apply = lambda *given: noised.append(1) or plain(*given)  # type: ignore[func-returns-value]
    with pytest.raises(BudgetExceeded, match="nothing was sent"):
        owner.release([1], ["b"], budget, gate=gate)
    assert (tmp_path / "ledger.jsonl").read_bytes() == before
    assert not noised


def test_a_call_of_several_conversations_leaves_whole_or_not_at_all(open_owner: Open):
    owner, wide, narrow = open_owner(None), SessionBudget(100), SessionBudget(4)
    with pytest.raises(BudgetExceeded):
        owner.release([3, 5], ["a", "b"], wide, narrow, gate=None)
    assert (wide.num_spent, narrow.num_spent, owner.num_released) == (0, 0, 0)
    owner.release([3, 4], ["a", "b"], wide, narrow, gate=None)
    assert (wide.num_spent, narrow.num_spent, owner.num_released) == (3, 4, 7)


def test_rows_of_one_conversation_are_added_up(open_owner: Open):
    owner, budget = open_owner(None), SessionBudget(7)
    with pytest.raises(BudgetExceeded, match="8 more vectors"):
        owner.release([4, 4], ["a", "b"], budget, budget, gate=None)
    owner.release([4, 3], ["a", "b"], budget, budget, gate=None)
    assert budget.num_left == 0


def test_a_replay_costs_nothing_even_where_nothing_is_left(open_owner: Open):
    owner, budget = open_owner(5), SessionBudget(5)
    first = owner.say(5, "a", budget)
    again = owner.say(5, "a", budget)
    assert again.is_replay
    assert bytes(again.packed.buffers[0]) == bytes(first.packed.buffers[0])
    assert (budget.num_spent, owner.num_released) == (5, 5)
    fresh = SessionBudget(1)
    assert owner.say(5, "a", fresh).is_replay
    assert fresh.num_spent == 0


def test_a_call_of_old_and_new_rows_pays_for_the_new_ones(open_owner: Open):
    owner, budget = open_owner(8), SessionBudget(8)
    first = owner.release([5, 3], ["a", "b"], budget, budget, gate=None)
    assert not first.is_replay
    rows = Rows(lengths=(5, 3))
    h_ND = torch.arange(float(8 * WIDTH)).reshape(-1, WIDTH)
    h_ND[7] = 0
    with pytest.raises(BudgetExceeded, match="3 more vectors and has 0 of 8"):
        owner.gate().release(h_ND, rows, ["a", "b"], "base", [budget, budget])


def test_the_day_is_full_at_its_very_limit(open_owner: Open):
    owner = open_owner(10)
    owner.say(6, "a")
    with pytest.raises(
        BudgetExceeded,
        match=r"generation: 5 vectors.* 4 of 10 are left for 2026-11-21 .*2026-11-22T00:00:00\+00",
    ):
        owner.say(5, "b")
    owner.say(4, "c")
    with pytest.raises(BudgetExceeded, match="0 of 10"):
        owner.say(1, "d")
    assert owner.num_released == 10


def test_a_restart_does_not_open_the_day_again(open_owner: Open):
    owner = open_owner(10)
    owner.say(9, "a")
    owner.restart()
    with pytest.raises(BudgetExceeded, match="1 of 10"):
        owner.say(2, "b")
    owner.say(1, "c")
    owner.restart()
    with pytest.raises(BudgetExceeded, match="0 of 10"):
        owner.say(1, "d")


def test_a_lowered_limit_holds_for_what_has_left_already(open_owner: Open):
    owner = open_owner(10)
    owner.say(9, "a")
    owner._day_limit = 5
    with pytest.raises(BudgetExceeded, match="0 of 5"):
        owner.say(1, "b")


def test_midnight_utc_opens_the_budget_and_not_the_owners_own_midnight(open_owner: Open):
    owner = open_owner(3)
    owner.say(3, "a")
    owner.clock.now = owner.clock.now.astimezone(timezone(timedelta(hours=9)))
    assert owner.clock.now.day == 22
    with pytest.raises(BudgetExceeded, match="2026-11-21 "):
        owner.say(1, "b")
    owner.clock.now += timedelta(seconds=1)
    owner.say(3, "c")
    with pytest.raises(BudgetExceeded, match="2026-11-22 "):
        owner.say(1, "d")
    owner.restart()
    with pytest.raises(BudgetExceeded, match="2026-11-22 "):
        owner.say(1, "d")


def test_training_does_not_spend_the_budget_of_generation(open_owner: Open):
    owner = open_owner(4)
    owner.release([50], ["row-0"], gate=owner.gate(ACTIVATIONS))
    owner.restart()
    owner.say(4, "a")
    with pytest.raises(BudgetExceeded):
        owner.say(1, "b")
    owner.release([50], ["row-1"], gate=owner.gate(ACTIVATIONS))


def test_a_line_that_cannot_be_written_is_not_spent(open_owner: Open):
    owner, budget = open_owner(10), SessionBudget(10)
    owner.ledger.close()
    with pytest.raises(StorageError):
        owner.say(3, "a", budget)
    assert budget.num_spent == 0


def test_threads_together_release_to_the_limit_and_no_vector_more(open_owner: Open):
    owner, budget = open_owner(45), SessionBudget(30)
    refused: list[int] = []

    def release(thread: int) -> None:
        for number in range(10):
            try:
                payers = [budget] if thread < 2 else []
                owner.say(3, f"t{thread}-{number}", *payers)
            except BudgetExceeded:
                refused.append(thread)

    threads = [threading.Thread(target=release, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert owner.num_released == 45
    assert len(refused) == 40 - 45 // 3
    assert budget.num_spent <= 30


def test_as_many_budgets_as_rows_are_wanted(open_owner: Open):
    with pytest.raises(ConfigError, match="1 budgets for 2 rows"):
        open_owner(None).release([1, 1], ["a", "b"], SessionBudget(9), gate=None)


@pytest.mark.parametrize("value", [0, -1, "many"])
def test_a_limit_is_a_whole_number_above_zero(value: object):
    with pytest.raises(ConfigError, match=r"generation\.max_day_vectors"):
        parse_settings(
            PrivacySettings, {"mechanism": "none", "generation": {"max_day_vectors": value}}, "t"
        )


def test_a_changed_budget_leaves_the_run_what_it_is(tmp_path: Path):
    plain = client_settings(tmp_path, tmp_path)
    budget = {"generation": {"max_day_vectors": 7}}
    limited = client_settings(tmp_path, tmp_path, privacy__generation=budget["generation"])
    assert limited.privacy.generation.max_day_vectors == 7
    train = TrainSettings(steps=1)
    assert run_identity(plain, train, "", {}) == run_identity(limited, train, "", {})
    other = client_settings(tmp_path, tmp_path, privacy__mechanism="gaussian", privacy__scale=0.02)
    assert run_identity(plain, train, "", {}) != run_identity(other, train, "", {})


def test_the_noise_of_a_run_from_before_budgets_has_the_same_digest():
    settings = PrivacySettings(mechanism="gaussian", scale=0.02)
    assert settings_digest(settings.noise()) == (
        "0be078fb820441cea3ab742b9bcffd94a08a5acde8f5db0c367cf85a25de4e3e"
    )
