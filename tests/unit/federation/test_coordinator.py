"""Rounds in the open: who is in, who is late, what comes out, what survives a restart."""

from pathlib import Path

import pytest
import torch

from cutlayer.errors import QuorumNotMet, StepExpired
from cutlayer.federation.chain import next_digest
from cutlayer.model.adapters import AdapterState, initial_state
from cutlayer.wire.federation_messages import EnterRound, Round, SendUpdate
from cutlayer.wire.header import Header
from tests.unit.federation.rounds_world import (
    ENDS,
    TRUNK,
    ToyMember,
    World,
    learnt,
    weight_of,
)

NAMES = ("a", "b", "c", "d")


def _close(found: AdapterState, wanted: AdapterState, tolerance: float = 1e-6) -> None:
    assert found.keys() == wanted.keys()
    for key in wanted:
        torch.testing.assert_close(found[key], wanted[key], rtol=tolerance, atol=tolerance)


def _return(member: ToyMember) -> None:
    """It is there again, before the others go on without it."""
    member.stops_before = lambda call: False
    while member.poll():
        pass


def _sends(call: Header) -> bool:
    return isinstance(call, SendUpdate)


def test_three_rounds_are_three_weighted_means(tmp_path: Path) -> None:
    world = World(tmp_path)
    members = world.add(*NAMES)
    world.run_to(3)
    world.pump()
    _close(world.final(), world.expected([NAMES] * 3))
    for member in members:
        assert member.is_finished
        assert [begun.round for begun in member.rounds] == [1, 2, 3, 4]
        _close(member.received, {key: world.final()[key] for key in ENDS})
    assert world.trunk.ended == [f"oncology.r{number}.a1" for number in (1, 2, 3)]
    rows = world.store.rounds()
    assert [row.survivors for row in rows] == [list(NAMES)] * 3
    assert rows[0].total_weight == sum(map(weight_of, NAMES))


def test_the_chain_of_rounds_can_be_followed(tmp_path: Path) -> None:
    world = World(tmp_path)
    (first, *_) = world.add(*NAMES)
    world.run_to(3)
    world.pump()
    for before, after in zip(first.rounds, first.rounds[1:], strict=False):
        payload = after.payload_digest
        assert after.digest == next_digest(before.digest, "oncology", before.round, payload)
    assert [row.digest for row in world.store.rounds()] == [r.digest for r in first.rounds[1:]]


def test_order_and_repetition_of_calls_change_nothing(tmp_path: Path) -> None:
    states = []
    for order in (NAMES, NAMES[::-1], ("c", "a", "d", "b")):
        world = World(tmp_path / "".join(order), rounds=2)
        world.add(*order)
        for _ in range(3):
            world.pump()
        world.run_to(2)
        states.append(world.final())
    for other in states[1:]:
        assert all(torch.equal(states[0][key], other[key]) for key in other)


def test_a_repeated_update_may_leave_its_tensors_at_home(tmp_path: Path) -> None:
    world = World(tmp_path, rounds=1)
    first, *_others = world.add("a", "b", "c")
    slow = world.members["c"]
    slow.stops_before = _sends
    world.advance()
    world.pump()
    assert isinstance(first.call, SendUpdate)
    world.coordinator.submit("a", first.call, {}, world.now_s)
    slow.stops_before = lambda call: False
    world.run_to(1)
    _close(world.final(), world.expected([("a", "b", "c")]))


def test_a_round_waits_for_more_members_only_as_long_as_it_gathers(tmp_path: Path) -> None:
    world = World(tmp_path, gather_s=5.0, rounds=2)
    world.add("a", "b", "c")
    world.pump()
    assert world.coordinator.status().stage == "gathering"
    assert world.coordinator.next_deadline_s() == world.now_s + 5.0
    world.now_s += 4.0
    world.add("d")
    world.pump()
    world.now_s += 1.0
    world.coordinator.tick(world.now_s)
    assert world.coordinator.status().cohort == NAMES
    world.pump()
    # From now on everybody who is there waits, so nothing is waited for.
    assert world.coordinator.is_finished


def test_listed_members_begin_as_soon_as_all_are_there(tmp_path: Path) -> None:
    world = World(tmp_path, members=list("abc"), gather_s=1e6, rounds=1)
    world.add("a", "b")
    world.pump()
    assert world.coordinator.status().stage == "gathering"
    world.add("c")
    world.pump()
    assert world.coordinator.is_finished


def test_a_straggler_is_left_out_and_is_in_the_next_round(tmp_path: Path) -> None:
    world = World(tmp_path, rounds=2)
    world.add(*NAMES)
    slow = world.members["d"]
    slow.stops_before = _sends
    world.run_to(1)
    assert world.store.rounds()[0].stragglers == ["d"]
    _return(slow)
    world.run_to(2)
    assert isinstance(slow.errors[0], StepExpired)
    assert "enter the next round" in str(slow.errors[0])
    assert world.store.rounds()[1].survivors == list(NAMES)
    _close(world.final(), world.expected([NAMES[:3], NAMES]))
    rows = {row.name: row for row in world.store.members()}
    assert (rows["d"].num_rounds, rows["d"].num_straggled) == (1, 1)


def test_too_few_updates_are_no_round(tmp_path: Path) -> None:
    world = World(tmp_path, max_attempts=2, rounds=1)
    world.add("a", "b", "c", stops_before=_sends)
    world.members["a"].stops_before = lambda call: False
    world.pump()
    for expected in ("updates", "gathering"):
        world.advance()
        world.pump()
        assert world.coordinator.status().stage == expected
    for name in "bc":
        world.members[name].enter()  # they give up and wait for the next beginning
    world.pump()
    assert world.coordinator.status().attempt == 2
    assert isinstance(world.members["a"].errors[-1], StepExpired)
    assert "quorum=3" in str(world.members["a"].errors[-1])
    world.advance()
    world.pump()
    status = world.coordinator.status()
    assert (status.stage, status.round) == ("stopped", 0)
    assert isinstance(world.members["a"].errors[-1], QuorumNotMet)
    assert "max_attempts" in status.stopped
    assert [row.number for row in world.store.attempts(1)] == [1, 2]
    world.restart()
    world.members["a"].restart()
    for name in "bc":
        world.members[name].stops_before = lambda call: False
        world.members[name].restart()
    world.run_to(1)
    assert world.store.rounds()[0].attempts == 3


def test_a_member_that_leaves_ends_an_attempt_at_once_if_too_few_are_left(tmp_path: Path) -> None:
    world = World(tmp_path, rounds=1)
    world.add("a", "b", "c", stops_before=_sends)
    world.advance()
    world.pump()
    before_s = world.now_s
    world.coordinator.leave("c", world.now_s)
    assert world.now_s == before_s
    assert world.coordinator.status().stage == "gathering"
    assert [row.left_at is None for row in world.store.members()] == [True, True, False]


def test_members_leave_return_and_come_late(tmp_path: Path) -> None:
    world = World(tmp_path, rounds=3)
    world.add("a", "b", "c")
    world.run_to(1)
    world.coordinator.leave("a", world.now_s)
    world.members["a"].is_alive = False
    world.add("d")
    world.run_to(2)
    world.members["a"].restart()
    world.run_to(3)
    world.pump()
    survivors = [row.survivors for row in world.store.rounds()]
    assert survivors == [list("abc"), list("bcd"), list("abcd")]
    _close(world.final(), world.expected(survivors))
    assert all(member.is_finished for member in world.members.values())


def test_a_lost_connection_is_waited_for_a_while(tmp_path: Path) -> None:
    world = World(tmp_path, rounds=1, phase_deadline_s=60.0)
    world.add(*NAMES)
    world.members["d"].stops_before = _sends
    world.advance()
    world.pump()
    world.coordinator.lost("d", world.now_s)
    # Nobody has told of any return so far, so a member that trains may be back unheard.
    assert world.coordinator.next_deadline_s() == world.now_s + 600.0
    world.coordinator.seen("a")
    assert world.coordinator.next_deadline_s() == world.now_s + 60.0
    world.coordinator.seen("d")
    assert world.coordinator.next_deadline_s() == world.now_s + 600.0
    world.coordinator.lost("d", world.now_s)
    world.advance()
    assert world.store.rounds()[0].stragglers == ["d"]


def test_a_member_restarted_while_it_trains_gets_the_same_round_again(tmp_path: Path) -> None:
    world = World(tmp_path, rounds=1)
    world.add("a", "b", "c")
    member = world.members["b"]
    member.stops_before = _sends
    world.advance()
    world.pump()
    world.coordinator.lost("b", world.now_s)
    member.restart()
    member.poll()
    assert [(r.round, r.attempt) for r in member.rounds] == [(1, 1), (1, 1)]
    member.stops_before = lambda call: False
    world.run_to(1)
    _close(world.final(), world.expected(["abc"]))


def test_cohorts_are_seeded_samples_and_everybody_has_a_turn(tmp_path: Path) -> None:
    cohorts = []
    for folder in ("one", "two"):
        world = World(tmp_path / folder, cohort=3, rounds=8, seed=7)
        world.add(*"abcdefg")
        world.run_to(8)
        cohorts.append([row.cohort for row in world.store.rounds()])
        world.store.close()
    assert cohorts[0] == cohorts[1]
    assert all(len(cohort) == 3 for cohort in cohorts[0])
    assert {name for cohort in cohorts[0] for name in cohort} == set("abcdefg")
    assert len({tuple(cohort) for cohort in cohorts[0]}) > 3


def test_a_restart_in_the_middle_loses_the_attempt_and_nothing_else(tmp_path: Path) -> None:
    world = World(tmp_path, rounds=2)
    world.add("a", "b", "c")
    world.run_to(1)
    world.members["c"].stops_before = _sends
    world.pump()
    assert world.coordinator.status().attempt == 1
    first = world.final()
    world.restart()
    assert all(torch.equal(first[key], value) for key, value in world.final().items())
    assert [row.outcome for row in world.store.attempts(2)] == ["void"]
    world.members["c"].stops_before = lambda call: False
    world.run_to(2)
    # Old calls met StepExpired, never an answer of the new attempt.
    assert isinstance(world.members["a"].errors[0], StepExpired)
    assert world.store.rounds()[1].attempts == 2
    _close(world.final(), world.expected(["abc", "abc"]))


def test_the_end_is_told_to_everybody_also_after_a_restart(tmp_path: Path) -> None:
    world = World(tmp_path, rounds=1)
    world.add("a", "b", "c")
    world.run_to(1)
    world.restart()
    late = world.add("z")[0]
    world.pump()
    assert late.is_finished
    assert late.rounds[-1].is_finished
    assert late.rounds[-1].round == 2
    _close(late.received, {key: world.final()[key] for key in ENDS})
    assert world.coordinator.next_deadline_s() is None


def test_more_rounds_can_be_asked_for_later(tmp_path: Path) -> None:
    world = World(tmp_path, rounds=1)
    world.add("a", "b", "c")
    world.run_to(1)
    world.settings = world.settings.model_copy(update={"rounds": 2})
    world.restart()
    for member in world.members.values():
        member.is_finished = False
        member.restart()
    world.run_to(2)
    _close(world.final(), world.expected(["abc", "abc"]))


@pytest.mark.parametrize("sharing", ["client", "group"])
def test_trunks_are_averaged_among_those_who_share_them(tmp_path: Path, sharing: str) -> None:
    groups = {"east": ["a", "b"], "west": ["c", "d"]} if sharing == "group" else {}
    world = World(tmp_path, rounds=1, trunk=sharing, groups=groups)
    world.add(*NAMES)
    world.run_to(1)
    owners = groups or {name: [name] for name in NAMES}
    for owner, names in owners.items():
        total = sum(map(weight_of, names))
        for key in TRUNK:
            mean = sum(weight_of(n) / total * learnt(n, 1, TRUNK)[key] for n in names)
            wanted = initial_state(TRUNK, 0)[key] + mean
            torch.testing.assert_close(world.final()[f"{owner}/{key}"], wanted)
            for name in names:
                torch.testing.assert_close(world.coordinator.trunk_state(name)[key], wanted)
    assert len(world.final()) == len(ENDS) + len(owners) * len(TRUNK)


def test_every_step_divides_all_parts_by_the_survivors_tokens(tmp_path: Path) -> None:
    chosen = {"kind": "every_step", "lr": 0.01, "clip_norm": 0.05, "weight_decay": 0.1}
    world = World(tmp_path, rounds=2, strategy=chosen)
    world.add(*NAMES)
    world.members["d"].stops_before = _sends
    world.run_to(1)
    _return(world.members["d"])
    world.run_to(2)
    state = {k: torch.nn.Parameter(v) for k, v in initial_state({**ENDS, **TRUNK}, 0).items()}
    adamw = torch.optim.AdamW(
        state.values(), lr=0.01, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.1
    )
    for number, names in enumerate(("abc", "abcd"), 1):
        total = sum(map(weight_of, names))
        for layout in (ENDS, TRUNK):
            gradients = [learnt(name, number, layout) for name in names]
            for key in layout:
                parts = zip(names, gradients, strict=True)
                state[key].grad = sum(weight_of(n) * g[key] for n, g in parts) / total
        torch.nn.utils.clip_grad_norm_(state.values(), 0.05)
        adamw.step()
    _close(world.final(), {key: value.detach() for key, value in state.items()}, 1e-5)


@pytest.mark.parametrize("kind", ["fedadam", "every_step"])
def test_the_servers_optimizer_survives_a_restart(tmp_path: Path, kind: str) -> None:
    finals = []
    for is_restarted in (False, True):
        world = World(tmp_path / str(is_restarted), rounds=2, strategy={"kind": kind})
        world.add("a", "b", "c")
        world.run_to(1)
        if is_restarted:
            world.restart()
        world.run_to(2)
        finals.append(world.final())
    assert all(torch.equal(finals[0][key], finals[1][key]) for key in finals[0])


def test_a_frozen_a_travels_in_no_update(tmp_path: Path) -> None:
    world = World(tmp_path, rounds=1, strategy={"kind": "fedavg_frozen_a"})
    world.add("a", "b", "c")
    world.run_to(1)
    first = initial_state({**ENDS, **TRUNK}, 0)
    for key, value in world.final().items():
        assert torch.equal(value, first[key]) == (".lora_A." in key), key


@pytest.mark.parametrize("kind", ["svd", "median", "trimmed_mean", "fedprox"])
def test_every_strategy_makes_rounds(tmp_path: Path, kind: str) -> None:
    world = World(tmp_path, rounds=2, strategy={"kind": kind})
    world.add(*NAMES)
    world.run_to(2)
    assert all(torch.isfinite(value).all() for value in world.final().values())
    assert world.final().keys() == {**ENDS, **TRUNK}.keys()


def test_a_trunk_that_is_gone_costs_an_attempt_not_the_federation(tmp_path: Path) -> None:
    world = World(tmp_path, rounds=1)
    world.add("a", "b", "c")
    world.trunk.is_down = True
    world.advance()
    world.advance()
    assert world.coordinator.status().stage == "gathering"
    assert "replica 1 is gone" in world.store.attempts(1)[-1].outcome
    world.trunk.is_down = False
    world.run_to(1)
    _close(world.final(), world.expected(["abc"]))


def test_a_trunk_update_that_is_nan_is_left_out_and_named(tmp_path: Path) -> None:
    world = World(tmp_path, rounds=1)
    world.add(*NAMES)
    world.trunk.poisoned = {"b"}
    world.run_to(1)
    wanted = world.expected([("a", "c", "d")])
    _close({k: world.final()[k] for k in TRUNK}, {k: wanted[k] for k in TRUNK})
    assert "b" in world.store.attempts(1)[0].outcome.split("updates of")[1]


def test_what_pages_show_is_there(tmp_path: Path) -> None:
    world = World(tmp_path, rounds=2)
    world.add(*NAMES)
    world.coordinator.count_bytes(0, 0)
    world.members["d"].stops_before = _sends
    world.advance()
    world.pump()
    world.coordinator.count_bytes(1000, 500)
    status = world.coordinator.status()
    assert (status.stage, status.round, status.rounds, status.attempt) == ("updates", 0, 2, 1)
    assert status.came == ("a", "b", "c")
    world.advance()
    world.pump()
    row = world.store.rounds()[0]
    assert (row.bytes_up, row.bytes_down, row.seconds) == (1000, 500, 600.0)
    waiting = {row.name for row in world.coordinator.members() if row.is_waiting}
    assert waiting <= {"a", "b", "c"}


def test_the_version_moves_whenever_an_answer_may_be_ready(tmp_path: Path) -> None:
    world = World(tmp_path, rounds=1)
    world.add("a", "b", "c")
    version, answered = world.coordinator.version, False
    call = EnterRound(federation="oncology", round=0, digest="", needs_state=True)
    for name in "abc":
        world.coordinator.submit(name, call, {}, world.now_s)
    world.now_s += 5.0
    world.coordinator.tick(world.now_s)
    answer = world.coordinator.answer("a", call)
    answered = answer is not None and isinstance(answer.header, Round)
    assert answered
    assert world.coordinator.version > version
