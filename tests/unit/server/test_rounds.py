"""The trunk's side of rounds: start states, contributions, and nothing on disk."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from cutlayer.errors import ConfigError, ProtocolError, StepExpired
from cutlayer.federation.cuts import block_of
from cutlayer.federation.trunk_pool import UpdateKind
from cutlayer.model.adapters import AdapterSettings, AdapterState, attach, layout_of
from cutlayer.model.partition import Cut, Trunk
from cutlayer.model.rows import Rows
from cutlayer.server.host import TrunkHost
from cutlayer.wire.messages import Commit
from tests.unit.server.trunk_world import (
    SETTINGS,
    backward_call,
    finished,
    forward_call,
    opening,
    random_ND,
    random_state,
    tiny_host,
    tiny_trunk,
)

ROUND = "fed.r1.a1"


def _begun(tmp_path: Path, *members: str) -> tuple[TrunkHost, dict[str, AdapterState]]:
    trunk = tiny_trunk(tmp_path)
    host = tiny_host(tmp_path, trunk)
    states = {member: random_state(trunk, seed) for seed, member in enumerate(members)}
    host.begin_round(ROUND, SETTINGS, states)
    return host, states


def _open(host: TrunkHost, owner: str, run_id: str = ROUND) -> int:
    return host.open_run(owner, opening(run_id, federation="fed"))


def _train(host: TrunkHost, owner: str, step: int, seed: int, run_id: str = ROUND) -> Tensor:
    y_ND = host.forward(owner, forward_call([4, 3], run_id, step), random_ND(7, seed))
    host.backward(owner, backward_call(run_id, step), random_ND(7, seed + 1))
    return y_ND


def _same(first: AdapterState, second: AdapterState) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


def test_layout_is_that_of_an_adapter_on_the_trunk(tmp_path: Path) -> None:
    trunk = tiny_trunk(tmp_path)
    shapes = tiny_host(tmp_path, trunk).adapter_layout(SETTINGS)
    state = attach(trunk, SETTINGS).state()
    assert shapes == {key: list(value.shape) for key, value in state.items()}


def test_member_starts_from_the_round_s_state_at_step_zero(tmp_path: Path) -> None:
    host, states = _begun(tmp_path, "a", "b")
    assert _open(host, "b") == 0
    h_ND = random_ND(7, 3)
    y_ND = host.forward("b", forward_call([4, 3], ROUND), h_ND)
    other = tiny_trunk(tmp_path)
    adapter = attach(other, SETTINGS)
    adapter.load(states["b"])
    assert torch.equal(y_ND, other(h_ND, Rows(lengths=(4, 3))).detach())


def test_delta_is_the_trained_weights_with_the_tokens_of_committed_steps(tmp_path: Path) -> None:
    host, _ = _begun(tmp_path, "a", "b", "c")
    for owner in "ab":
        _open(host, owner)
    for step, num_tokens in ((1, 5), (2, 6)):
        _train(host, "a", step, seed=step)
        host.commit(
            "a", Commit(run_id=ROUND, commit=finished(step, num_tokens), save=False, step=step)
        )
    after_two = host._runs["a", ROUND]._adapter.state()
    _train(host, "a", 3, seed=3)
    _train(host, "b", 1, seed=1)
    updates = host.collect(ROUND, ["a", "b", "c", "nobody"], UpdateKind.DELTA)
    assert list(updates) == ["a"]
    assert updates["a"].weight == 11
    assert _same(updates["a"].state, after_two)
    assert _same(host.collect(ROUND, ["a"], UpdateKind.DELTA)["a"].state, after_two)


def test_gradient_is_that_of_the_open_step_s_summed_loss(tmp_path: Path) -> None:
    host, states = _begun(tmp_path, "a", "b")
    for owner in "ab":
        _open(host, owner)
    for micro in range(2):
        host.forward("a", forward_call([4, 3], ROUND, micro=micro), random_ND(7, micro))
    host.forward("b", forward_call([4, 3], ROUND), random_ND(7, 0))
    host.backward("a", backward_call(ROUND, micro=0, is_last=False), random_ND(7, 8))
    assert not host.collect(ROUND, ["a", "b"], UpdateKind.GRADIENT)
    host.backward("a", backward_call(ROUND, micro=1), random_ND(7, 9))
    updates = host.collect(ROUND, ["a", "b"], UpdateKind.GRADIENT)
    assert list(updates) == ["a"]
    assert updates["a"].weight == 0
    other = tiny_trunk(tmp_path)
    adapter = attach(other, SETTINGS)
    adapter.load(states["a"])
    for micro in range(2):
        y_ND = other(random_ND(7, micro), Rows(lengths=(4, 3)))
        y_ND.backward(random_ND(7, 8 + micro))
    assert _same(updates["a"].state, adapter.gradients())


def test_gradient_of_a_frozen_factor_is_zero(tmp_path: Path) -> None:
    trunk = tiny_trunk(tmp_path)
    host = tiny_host(tmp_path, trunk)
    settings = SETTINGS.model_copy(update={"train_a": False})
    host.begin_round(ROUND, settings, {"a": random_state(trunk, 0)})
    host.open_run("a", opening(ROUND, settings, federation="fed"))
    _train(host, "a", 1, seed=0)
    state = host.collect(ROUND, ["a"], UpdateKind.GRADIENT)["a"].state
    assert state.keys() == random_state(trunk, 0).keys()
    assert all((value == 0).all() == ("lora_A" in key) for key, value in state.items())


def test_next_round_reuses_the_member_s_adapter_but_nothing_that_it_learnt(tmp_path: Path) -> None:
    host, states = _begun(tmp_path, "a")
    _open(host, "a")
    first = _train(host, "a", 1, seed=5)
    host.commit("a", Commit(run_id=ROUND, commit=finished(1, 7), save=True, step=1))
    learnt = host.collect(ROUND, ["a"], UpdateKind.DELTA)["a"].state
    _train(host, "a", 2, seed=6)
    adapter = host._runs["a", ROUND]._adapter
    host.end_round(ROUND)
    host.begin_round("fed.r2.a1", SETTINGS, states)
    assert _open(host, "a", "fed.r2.a1") == 0
    assert host._runs["a", "fed.r2.a1"]._adapter is adapter
    assert torch.equal(_train(host, "a", 1, seed=5, run_id="fed.r2.a1"), first)
    host.commit("a", Commit(run_id="fed.r2.a1", commit=finished(1, 7), save=False, step=1))
    assert _same(host.collect("fed.r2.a1", ["a"], UpdateKind.DELTA)["a"].state, learnt)
    assert not (tmp_path / "state" / "runs").exists()


def test_member_that_opens_again_begins_the_round_anew(tmp_path: Path) -> None:
    host, _ = _begun(tmp_path, "a")
    _open(host, "a")
    first = _train(host, "a", 1, seed=5)
    host.commit("a", Commit(run_id=ROUND, commit=finished(1, 7), save=False, step=1))
    assert _open(host, "a") == 0
    assert not host.collect(ROUND, ["a"], UpdateKind.DELTA)
    assert torch.equal(_train(host, "a", 1, seed=5), first)


def test_run_of_an_earlier_round_is_closed_when_its_adapter_is_taken(tmp_path: Path) -> None:
    host, states = _begun(tmp_path, "a")
    _open(host, "a")
    host.begin_round("fed.r1.a2", SETTINGS, states)
    _open(host, "a", "fed.r1.a2")
    with pytest.raises(StepExpired):
        _train(host, "a", 1, seed=0)
    _train(host, "a", 1, seed=0, run_id="fed.r1.a2")


def test_round_that_has_not_begun_or_is_over_is_refused(tmp_path: Path) -> None:
    host, _ = _begun(tmp_path, "a")
    with pytest.raises(StepExpired, match="not open for a"):
        _open(host, "a", "fed.r2.a1")
    with pytest.raises(StepExpired, match="not open for b"):
        _open(host, "b")
    _open(host, "a")
    host.end_round(ROUND)
    host.end_round("never begun")
    for call in (lambda: _open(host, "a"), lambda: _train(host, "a", 1, seed=0)):
        with pytest.raises(StepExpired):
            call()
    assert host.graph_bytes == 0


def test_other_adapter_settings_than_the_round_s_are_refused(tmp_path: Path) -> None:
    host, _ = _begun(tmp_path, "a")
    other = SETTINGS.model_copy(update={"alpha": 7.0})
    with pytest.raises(ConfigError, match="take the federation's settings"):
        host.open_run("a", opening(ROUND, other, federation="fed"))
    with pytest.raises(ConfigError, match="begun with other"):
        host.begin_round(ROUND, other, {})
    with pytest.raises(ConfigError, match="limit"):
        host.begin_round("fed.r2.a1", SETTINGS.model_copy(update={"rank": 300}), {})


def test_state_that_does_not_fit_the_trunk_is_refused(tmp_path: Path) -> None:
    host, states = _begun(tmp_path, "a")
    state = states["a"] | {"extra": torch.zeros(1)}
    with pytest.raises(ProtocolError, match="start state of b"):
        host.begin_round(ROUND, SETTINGS, {"b": state})


def test_beginning_again_adds_members(tmp_path: Path) -> None:
    host, states = _begun(tmp_path, "a")
    _open(host, "a")
    host.begin_round(ROUND, SETTINGS, {"b": states["a"]})
    assert _open(host, "b") == 0
    _train(host, "a", 1, seed=0)


def test_runs_of_rounds_are_not_unloaded_for_other_runs(tmp_path: Path) -> None:
    host, _ = _begun(tmp_path, "a")
    _open(host, "a")
    for number in range(6):
        host.open_run("a", opening(f"own{number}"))
    assert len(host.runs()) == 5
    _train(host, "a", 1, seed=0)


def test_member_cannot_have_adapters_made_under_made_up_federations(tmp_path: Path) -> None:
    host, _ = _begun(tmp_path, "a")
    for name in ("other", "fed.r1", ""):
        with pytest.raises(ProtocolError, match="no round of federation"):
            host.open_run("a", opening(ROUND, federation=name))
    _open(host, "a")


def test_member_cannot_claim_more_tokens_than_its_rows_had(tmp_path: Path) -> None:
    host, _ = _begun(tmp_path, "a")
    _open(host, "a")
    _train(host, "a", 1, seed=0)
    claim = Commit(run_id=ROUND, commit=finished(1, 1 << 40), save=False, step=1)
    with pytest.raises(ProtocolError, match="7 tokens in all"):
        host.commit("a", claim)
    host.commit("a", Commit(run_id=ROUND, commit=finished(1, 7), save=False, step=1))
    assert host.collect(ROUND, ["a"], UpdateKind.DELTA)["a"].weight == 7


def test_own_run_of_a_round_s_name_is_not_collected(tmp_path: Path) -> None:
    host, _ = _begun(tmp_path, "a")
    host.open_run("a", opening(ROUND, SETTINGS.model_copy(update={"rank": 5})))
    _train(host, "a", 1, seed=0)
    host.commit("a", Commit(run_id=ROUND, commit=finished(1, 7), save=False, step=1))
    for kind in UpdateKind:
        assert not host.collect(ROUND, ["a"], kind)


def test_what_the_trunk_s_adapter_consists_of_is_found_once_in_a_round(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A sparse adapter's rows are chosen by the norms of all weights, which takes a while."""
    walks = []

    def counted(part: Trunk, settings: AdapterSettings) -> dict[str, list[int]]:
        walks.append(part)
        return layout_of(part, settings)

    monkeypatch.setattr("cutlayer.server.rounds.layout_of", counted)
    trunk = tiny_trunk(tmp_path)
    host, state, held = tiny_host(tmp_path, trunk), random_state(trunk, 1), trunk.block_range
    cuts = {"a": Cut(held.start, held.stop), "b": Cut(held.start, held.start + 1)}
    for member, cut in cuts.items():
        own = {key: x for key, x in state.items() if block_of(key) in cut.trunk}
        host.begin_round(ROUND, SETTINGS, {member: own})
    for member, cut in cuts.items():
        assert host.open_run(member, opening(ROUND, federation="fed"), cut) == 0
    with pytest.raises(ProtocolError, match=f"for b with other blocks than {held.start}:"):
        host.open_run("b", opening(ROUND, federation="fed"), cuts["a"])
    assert len(walks) == 1
