"""The account as a client's settings want it: where, for which gates, and under which budgets."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from cutlayer.client.accounts import (
    account_path,
    check_gradients,
    report_from_files,
    report_of_run,
    shared_boundaries,
)
from cutlayer.client.gates import generation_gate, training_gates
from cutlayer.client.settings import ClientSettings
from cutlayer.errors import BudgetExceeded, ConfigError
from cutlayer.model.rows import Rows
from cutlayer.privacy.guarantee import PrivacyUnit
from cutlayer.privacy.run_privacy import RunPrivacy, open_run_privacy
from cutlayer.privacy.update_gate import UpdateGate
from tests.worlds import client_settings

CLIPPED = {"privacy__mechanism": "clipped_gaussian", "privacy__scale": 20.0, "privacy__clip": 1.0}
GRADIENTS = {
    "train__clip_norm": 0,
    "privacy__gradient_mechanism": "clipped_gaussian",
    "privacy__gradient_scale": 20.0,
    "privacy__gradient_clip": 1.0,
}


def settings(folder: Path, **changes: object) -> ClientSettings:
    return client_settings(folder / "model", folder, **changes)


@pytest.fixture
def run(tmp_path: Path) -> Iterator[RunPrivacy]:
    with open_run_privacy(tmp_path / "run", "run-1") as run:
        yield run


def release(gates: object, name: str, version: str = "step0") -> None:
    x_ND = torch.ones(2, 4) * len(name + version)
    gates.release(x_ND, Rows(lengths=(2,)), [name], version)  # type: ignore[attr-defined]


def release_until_refused(gate: object) -> None:
    for number in range(100):
        release(gate, "row0", f"step{number + 1}")


def test_the_account_lies_beside_the_run_and_never_inside(tmp_path: Path):
    assert account_path(settings(tmp_path)) == tmp_path / "privacy-account.jsonl"
    inside = settings(tmp_path, privacy__account_file=str(tmp_path / "run" / "sub" / "account"))
    with pytest.raises(ConfigError, match="lies in the run folder"):
        account_path(inside)


def test_every_release_of_a_head_that_learns_concerns_every_row(tmp_path: Path):
    learns = settings(tmp_path)
    frozen = settings(tmp_path, adapter__parts=["trunk", "tail"])
    no_blocks = settings(tmp_path, model__lower=0)
    assert shared_boundaries(learns) == {"activations", "gradients", "generation"}
    assert shared_boundaries(frozen) == shared_boundaries(no_blocks) == {"gradients"}


def test_a_keep_share_makes_every_row_choose_what_the_others_release(tmp_path: Path):
    frozen = {"adapter__parts": ["trunk", "tail"], "privacy__withhold": "private", **CLIPPED}
    assert shared_boundaries(settings(tmp_path, **frozen)) == {"gradients"}
    chosen = settings(tmp_path, **frozen, privacy__keep_share=0.1)
    assert shared_boundaries(chosen) == {"activations", "gradients"}


def test_a_run_without_noise_and_budget_keeps_no_account(tmp_path: Path, run: RunPrivacy):
    own = settings(tmp_path)
    release(training_gates(own, run).activations, "row0")
    assert not account_path(own).exists()


def test_a_run_with_an_epsilon_is_in_the_account(tmp_path: Path, run: RunPrivacy):
    own = settings(tmp_path, **CLIPPED)
    release(training_gates(own, run).activations, "row0")
    release(generation_gate(own, run), "row")
    assert len(account_path(own).read_text().splitlines()) == 2


def test_a_run_without_noise_does_not_go_unseen_by_an_account(tmp_path: Path, run: RunPrivacy):
    own = settings(tmp_path)
    account_path(own).touch()
    release(training_gates(own, run).activations, "row0")
    assert '"is_unbounded":true' in account_path(own).read_text()


def test_a_budget_refuses_the_exact_gradient_norm(tmp_path: Path):
    own = settings(tmp_path, **CLIPPED, **GRADIENTS, privacy__budget={"run_epsilon": 8.0})
    check_gradients(own)
    assert own.train is not None
    assert own.train.clip_norm is None
    told = own.model_copy(update={"train": own.train.model_copy(update={"clip_norm": 1.0})})
    with pytest.raises(ConfigError, match=r"train\.clip_norm = 0"):
        check_gradients(told)


def test_training_is_refused_before_its_first_gradient_breaks_the_budget(
    tmp_path: Path, run: RunPrivacy
):
    budget = {"privacy__budget": {"run_epsilon": 8.0}, "train__clip_norm": 0}
    own = settings(tmp_path, **CLIPPED, **budget)
    with pytest.raises(ConfigError, match="gradients leave with 'no noise: none'"):
        training_gates(own, run)
    check_gradients(settings(tmp_path, **CLIPPED, **{**budget, **GRADIENTS}))
    check_gradients(settings(tmp_path, **CLIPPED, **budget, adapter__parts=["tail"]))
    lower = {"run_epsilon": 8.0, "boundaries": ["activations", "generation"]}
    check_gradients(settings(tmp_path, **CLIPPED, privacy__budget=lower, train__clip_norm=0))


def test_both_gates_spend_one_budget_and_the_report_says_so(tmp_path: Path, run: RunPrivacy):
    own = settings(tmp_path, **CLIPPED, **GRADIENTS, privacy__budget={"run_epsilon": 1.2})
    gates = training_gates(own, run)
    release(gates.activations, "row0")
    release(gates.gradients, "row0")
    with pytest.raises(BudgetExceeded, match="gradients: epsilon per row"):
        release_until_refused(gates.gradients)
    report = report_of_run(own, run, "run-1")
    (state,) = report.budgets
    assert 0.8 < state.spent <= 1.2
    together = [p for p in report.promises if p.boundary == "together"]
    assert [p.rdp.unit for p in together] == list(PrivacyUnit)
    assert together[1].rdp.epsilon == pytest.approx(state.spent)
    assert "per row (delta 1e-05, replace one, RDP; all vectors of one row" in report.summary(
        PrivacyUnit.ROW
    )


def test_a_report_from_files_is_the_open_runs_own_and_tighter(tmp_path: Path, run: RunPrivacy):
    own = settings(tmp_path, **CLIPPED)
    for number in range(3):
        release(training_gates(own, run).activations, "row0", f"step{number}")
    live, stored = report_of_run(own, run, "run-1"), report_from_files(own)
    assert stored.num_vectors == live.num_vectors == {"activations": 6}
    for fast, tight in zip(live.promises, stored.promises, strict=True):
        assert fast.rdp == tight.rdp
        assert tight.pld is not None
        assert tight.pld.epsilon is not None
        assert fast.rdp.epsilon is not None
        assert 0 < tight.pld.epsilon < fast.rdp.epsilon


def test_a_report_of_noise_without_a_clip_has_no_number(tmp_path: Path, run: RunPrivacy):
    own = settings(tmp_path, privacy__mechanism="gaussian", privacy__scale=0.02)
    release(training_gates(own, run).activations, "row0")
    report = report_from_files(own)
    assert report.summary(PrivacyUnit.ROW) == "no guarantee (unclipped)"
    assert all(promise.as_json()["epsilon_rdp"] is None for promise in report.promises)


def test_a_report_names_what_left_and_is_in_no_epsilon(tmp_path: Path, run: RunPrivacy):
    own = settings(tmp_path, **CLIPPED, **GRADIENTS)
    release(training_gates(own, run).activations, "row0")
    assert report_of_run(own, run, "run-1").uncounted == ()
    gate = UpdateGate(run.ledger, allows_plain=True, publishes=True)
    gate.plain({"lora": torch.ones(2, 2)}, "round1")
    gate.metrics({"loss": 1.0}, "round1")
    report = report_of_run(own, run, "run-1")
    assert report.uncounted == ("metrics", "updates")
    assert "metrics, updates left too, without a guarantee" in report.summary(PrivacyUnit.CLIENT)
    assert report.as_json()["uncounted"] == ["metrics", "updates"]
    assert "every vector that this owner released" in report.summary(PrivacyUnit.CLIENT)


def test_a_report_of_no_run_says_so(tmp_path: Path):
    with pytest.raises(ConfigError, match="holds no run"):
        report_from_files(settings(tmp_path))
