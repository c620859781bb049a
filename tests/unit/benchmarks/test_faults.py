"""The fault campaign notices: planted mistakes are judged wrong, right worlds are not."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

import cutlayer.federation.rounds
from benchmarks.fault_evidence import Ending, Evidence, Sent, StoreSeen, read_store
from benchmarks.fault_judge import judge
from benchmarks.fault_plan import COMMIT_STAGES, LEAST, SERVER, Deed, Fault, Mode, Plan, plan_of
from benchmarks.fault_settings import World, rules_of
from benchmarks.fault_twin import Twin, differences
from benchmarks.fault_witness import witnesses
from benchmarks.fault_world import run_in_threads
from benchmarks.faults import main
from cutlayer.federation.aggregation import Update, weighted_mean
from cutlayer.federation.chain import first_digest, next_digest, payload_digest
from cutlayer.federation.checkpoints import Checkpoint
from cutlayer.federation.store import FederationStore
from cutlayer.federation.store_rows import Pinned, RoundRow
from cutlayer.federation.trunk_pool import TrunkUpdate
from cutlayer.model.adapters import AdapterState, initial_state
from tests.tiny_models import tiny_llama_folder

NAMES = ("anna", "bert", "cleo")
ENDS = {"0.lora_A": [2, 3], "0.lora_B": [3, 2]}
TRUNK = {"1.lora_A": [2, 3]}
WEIGHTS = {"anna": 5, "bert": 7, "cleo": 20}
PLAN = Plan(
    seed=0,
    mode=Mode.PLAIN,
    members=NAMES,
    rounds=1,
    local_steps=1,
    faults=(),
    is_real=False,
)


def _learnt(layout: dict[str, list[int]], seed: int) -> AdapterState:
    generator = torch.Generator().manual_seed(seed)
    return {key: torch.randn(shape, generator=generator) for key, shape in layout.items()}


def _mean(updates: dict[str, AdapterState], weights: dict[str, int]) -> AdapterState:
    total = sum(weights.values())
    keys = next(iter(updates.values()))
    return {k: sum(weights[m] / total * updates[m][k] for m in weights) for k in keys}


def _world(folder: Path, weights: dict[str, int] = WEIGHTS, **changes: object) -> Evidence:
    """One plain round as it has to be, but for what the weights or the changes of its row say."""
    rules = rules_of(PLAN)
    ends = {name: _learnt(ENDS, number) for number, name in enumerate(NAMES)}
    trunk = {name: _learnt(TRUNK, 10 + number) for number, name in enumerate(NAMES)}
    first = initial_state({**ENDS, **TRUNK}, 0)
    mean = {**_mean(ends, weights), **_mean(trunk, weights)}
    state = {key: first[key] + mean[key] for key in first}
    payload = payload_digest({key: state[key] for key in ENDS})
    start = first_digest(rules.name, payload_digest(initial_state(ENDS, 0)))
    row = RoundRow(
        number=1, attempts=1, began_at="", ended_at="", seconds=0.0, cohort=list(NAMES),
        survivors=list(NAMES), stragglers=[], total_weight=sum(WEIGHTS.values()), bytes_up=0,
        bytes_down=0, digest=next_digest(start, rules.name, 1, payload), payload_digest=payload,
    )  # fmt: skip
    with FederationStore(folder / "store", rules.name) as store:
        store.pin(Pinned(fingerprint={}, layout=ENDS, member="anna"))
        for name in NAMES:
            store.add_member(name)
        store.begin_attempt(1, 1, NAMES)
        store.commit_round(replace(row, **changes), Checkpoint(state=state))
    result = {key: state[key] for key in ENDS}
    learnt = {
        name: TrunkUpdate(
            state={key: first[key] + x for key, x in trunk[name].items()}, weight=WEIGHTS[name]
        )
        for name in NAMES
    }
    return Evidence(
        rules=rules,
        victims=frozenset({"cleo"}),
        trunk_layout=TRUNK,
        endings={name: Ending(outcome="finished", ends=dict(result)) for name in NAMES},
        sent={(n, 1, 1): [Sent(update=ends[n], weight=WEIGHTS[n])] for n in NAMES},
        trunk={f"{rules.name}.r1.a1": [learnt]},
        store=read_store(folder / "store"),
    )


def test_a_right_world_is_judged_right(tmp_path: Path) -> None:
    verdict = judge(_world(tmp_path))
    assert (verdict.kind, verdict.reasons) == ("right", ())


def test_an_update_that_counts_twice_is_judged_wrong(tmp_path: Path) -> None:
    verdict = judge(_world(tmp_path, weights={**WEIGHTS, "anna": 10}))
    assert verdict.kind == "wrong"
    assert "from the mean of its survivors" in verdict.reasons[0]


def test_an_update_that_is_lost_is_judged_wrong(tmp_path: Path) -> None:
    verdict = judge(_world(tmp_path, weights={"bert": 7, "cleo": 20}))
    assert verdict.kind == "wrong"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"survivors": ["anna", "anna", "bert", "cleo"]}, "twice"),
        ({"survivors": ["anna", "bert"], "stragglers": ["cleo"]}, "fewer than 3"),
        ({"stragglers": ["cleo"]}, "are not the cohort"),
        ({"total_weight": 37}, "weighs 37"),
        ({"digest": "00"}, "does not follow"),
        ({"payload_digest": "00"}, "does not follow"),
        ({"attempts": 2}, "finished, 2 counts"),
    ],
)
def test_a_row_that_does_not_fit_is_judged_wrong(
    tmp_path: Path, changes: dict[str, object], said: str
) -> None:
    verdict = judge(_world(tmp_path, **changes))
    assert verdict.kind == "wrong"
    assert any(said in reason for reason in verdict.reasons), verdict.reasons


def _another_bit(evidence: Evidence) -> None:
    ends = evidence.endings["bert"].ends
    assert ends is not None
    x = ends["0.lora_A"].clone()
    x[0, 0] = torch.nextafter(x[0, 0], torch.tensor(9.0))
    evidence.endings["bert"] = Ending(outcome="finished", ends={**ends, "0.lora_A": x})


def _end(name: str, outcome: str, error: str = "") -> Callable[[Evidence], None]:
    return lambda evidence: evidence.endings.update({name: Ending(outcome=outcome, error=error)})


def _no_trunk_of_anna(evidence: Evidence) -> None:
    (collected,) = evidence.trunk.values()
    collected[0] = {name: x for name, x in collected[0].items() if name != "anna"}


def _half_a_trunk(evidence: Evidence) -> None:
    (collected,) = evidence.trunk.values()
    halved = replace(collected[0]["anna"], weight=2)
    collected[0] = {**collected[0], "anna": halved}


def _never_sent(evidence: Evidence) -> None:
    del evidence.sent["anna", 1, 1]


@pytest.mark.parametrize(
    ("spoil", "kind"),
    [
        (_another_bit, "wrong"),
        (_no_trunk_of_anna, "wrong"),
        (_half_a_trunk, "wrong"),
        (_never_sent, "wrong"),
        (_end("anna", "broke", "KeyError"), "wrong"),
        (_end("anna", "refused", "CutlayerError"), "wrong"),
        (_end("anna", "refused", "QuorumNotMet"), "wrong"),
        (_end("cleo", "refused", "ProtocolError"), "right"),
        (_end("cleo", "refused", "RuntimeError"), "wrong"),
        (_end("anna", "hung"), "hung"),
        (_end("anna", "gone"), "right"),
        (_end("anna", "finished"), "wrong"),
    ],
)
def test_what_members_ended_with_counts(
    tmp_path: Path, spoil: Callable[[Evidence], None], kind: str
) -> None:
    evidence = _world(tmp_path)
    spoil(evidence)
    assert judge(evidence).kind == kind


def test_all_refused_over_a_right_store_is_a_refusal_and_over_a_wrong_one_is_wrong(
    tmp_path: Path,
) -> None:
    for name, weights in (("right", WEIGHTS), ("wrong", {"anna": 5, "cleo": 20})):
        (tmp_path / name).mkdir()
        evidence = _world(tmp_path / name, weights=weights)
        for member in NAMES:
            evidence.endings[member] = Ending(outcome="refused", error="QuorumNotMet")
        assert judge(evidence).kind == {"right": "refused", "wrong": "wrong"}[name]


def test_who_finished_before_a_rollback_has_the_lost_rounds_result(tmp_path: Path) -> None:
    evidence = _world(tmp_path)
    assert evidence.store is not None
    empty = StoreSeen(rounds=(), attempts=(), members=(), checkpoints={}, layout=ENDS)
    evidence.store, evidence.store_before = empty, evidence.store
    assert judge(evidence).kind == "right"
    _another_bit(evidence)
    assert judge(evidence).kind == "wrong"


def _first_counts_twice(updates: Sequence[Update]) -> AdapterState:
    return weighted_mean([replace(updates[0], weight=2 * updates[0].weight), *updates[1:]])


@pytest.mark.parametrize("is_planted", [False, True])
def test_a_federation_that_counts_a_member_twice_is_judged_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_planted: bool
) -> None:
    lost_reply = Fault(
        victim="anna", deed=Deed.LOSE_REPLY, stage="SEND_UPDATE", occurrence=1, is_after=False,
        seconds=0.3, returns=True, pick=0.5,
    )  # fmt: skip
    plan = replace(PLAN, seed=1001 + is_planted, faults=(lost_reply,))
    if is_planted:
        monkeypatch.setattr(cutlayer.federation.rounds, "weighted_mean", _first_counts_twice)
    folder = tmp_path / "world"
    folder.mkdir(mode=0o700)
    model = tiny_llama_folder(tmp_path)
    with witnesses():
        evidence = run_in_threads(plan, folder, model)
    assert evidence.happened
    verdict = judge(evidence)
    assert verdict.kind == ("wrong" if is_planted else "right"), verdict.reasons
    world = World(plan=plan, folder=folder, model=model)
    if not is_planted:
        _check_twin(Twin(model), world, evidence)


def _check_twin(twin: Twin, world: World, evidence: Evidence) -> None:
    """The unsplit model learns the same, and notices who learnt something else."""
    assert not list(differences(twin, world, evidence))
    (sent,) = evidence.sent["bert", 1, 1]
    odd: dict[str, Tensor] = {key: x * 1.01 for key, x in sent.update.items()}
    evidence.sent["bert", 1, 1] = [replace(sent, update=odd)]
    assert any("bert" in line for line in differences(twin, world, evidence))


def test_plans_repeat_and_leave_enough_members() -> None:
    plans = [plan_of(seed) for seed in range(200)]
    assert plans == [plan_of(seed) for seed in range(200)]
    for plan in plans:
        gone = {
            fault.victim
            for fault in plan.faults
            if fault.victim != SERVER and (fault.deed is Deed.CORRUPT or not fault.returns)
        }
        assert len(plan.members) - len(gone) >= LEAST, plan


def test_two_hundred_plans_have_every_deed_at_every_stage() -> None:
    faults = [fault for seed in range(200) for fault in plan_of(seed).faults]
    assert {fault.deed for fault in faults} == set(Deed)
    stages = {fault.stage for fault in faults}
    assert stages >= {"JOIN", "SHARE_SECRETS", "BACKWARD", "UNMASK", *COMMIT_STAGES}
    killed = {fault.stage for fault in faults if fault.deed is Deed.KILL}
    assert killed >= stages - {"TRAINING", "BETWEEN"}


def test_the_campaign_runs_one_scenario_again(capfd: pytest.CaptureFixture[str]) -> None:
    result = main(["--only", "3", "--workers", "1", "--json"])
    assert (result["scenarios"], result["wrong"], result["hung"]) == (1, 0, 0)
    assert result["faults_struck"]
    assert '"bad_seeds": ""' in capfd.readouterr().out
