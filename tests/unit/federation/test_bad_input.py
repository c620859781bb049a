"""What a wrong, hostile or confused member can send: refused by name, and nobody else notices."""

import math
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
import torch

from cutlayer.errors import (
    ConfigError,
    CutlayerError,
    PermissionRefused,
    ProtocolError,
    SpecMismatch,
    StepExpired,
    StorageError,
)
from cutlayer.federation.rounds import trunk_contributions
from cutlayer.federation.rules import Rules
from cutlayer.federation.trunk_pool import TrunkUpdate, UpdateKind
from cutlayer.wire.federation_messages import (
    EnterRound,
    Join,
    Publish,
    SendUpdate,
    ShareKeys,
    Unmask,
)
from cutlayer.wire.header import Header
from tests.unit.federation.rounds_world import (
    ENDS,
    FINGERPRINT,
    TRUNK,
    ToyMember,
    World,
    learnt,
)

A = next(iter(ENDS))


def _join(world: World, name: str, **changes: object) -> None:
    call = Join(federation="oncology", fingerprint=dict(FINGERPRINT), layout=dict(ENDS))
    world.coordinator.join(name, msgspec.structs.replace(call, **changes), world.now_s)


def _others_finish(world: World, *names: str) -> None:
    world.run_to(world.settings.rounds)
    row = world.store.rounds()[-1]
    assert row.survivors == sorted(names)
    states = [names] * world.settings.rounds
    wanted = world.expected(states)
    for key, value in world.final().items():
        torch.testing.assert_close(value, wanted[key], rtol=1e-6, atol=1e-6)


def test_another_model_cut_tokenizer_or_adapter_is_refused_field_by_field(tmp_path: Path) -> None:
    world = World(tmp_path, rounds=1)
    world.add("a", "b", "c")
    wrong = FINGERPRINT | {"model": "other", "cut": "2:3", "extra": "x"}
    del wrong["tokenizer"]
    with pytest.raises(SpecMismatch) as caught:
        _join(world, "z", fingerprint=wrong)
    text = str(caught.value)
    for field in ("model: other, the federation has abc", "cut: 2:3", "tokenizer: absent", "extra"):
        assert field in text
    assert "adapter:" not in text
    assert "as a began it" in text
    _others_finish(world, "a", "b", "c")


def test_the_fingerprint_is_pinned_over_restarts(tmp_path: Path) -> None:
    world = World(tmp_path, rounds=1)
    world.add("a")
    world.restart()
    with pytest.raises(SpecMismatch, match="model: other"):
        _join(world, "b", fingerprint=FINGERPRINT | {"model": "other"})


def test_another_adapter_shape_is_refused_by_its_tensor(tmp_path: Path) -> None:
    world = World(tmp_path)
    world.add("a")
    with pytest.raises(SpecMismatch, match=r"lora_A.weight: \[4, 6\], the federation has \[2, 6\]"):
        _join(world, "b", layout={**ENDS, A: [4, 6]})
    with pytest.raises(SpecMismatch, match="absent"):
        _join(world, "b", layout={key: shape for key, shape in ENDS.items() if key != A})


def test_a_first_member_with_the_wrong_model_can_be_got_rid_of(tmp_path: Path) -> None:
    world = World(tmp_path, rounds=1)
    _join(world, "wrong", fingerprint={"model": "other"})
    with pytest.raises(SpecMismatch):
        _join(world, "a")
    world.coordinator.leave("wrong", world.now_s)
    world.add("a", "b", "c")
    _others_finish(world, "a", "b", "c")


@pytest.mark.parametrize(
    ("changes", "error", "match"),
    [
        ({"federation": "cardiology"}, ConfigError, "runs the federation 'oncology'"),
        ({"layout": {**ENDS, **TRUNK}}, SpecMismatch, "the trunk's here"),
        ({"layout": {A: [1 << 20, 1 << 20]}}, ProtocolError, "limit"),
        ({"layout": {A: [-1]}}, ProtocolError, "malformed"),
        ({"layout": {A: []}}, ProtocolError, "malformed"),
        ({"layout": {A: [2, 0]}}, ProtocolError, "malformed"),
        ({"layout": {"a/../b": [1]}}, ProtocolError, "malformed"),
        ({"layout": {f"k{i}": [1] for i in range(9000)}}, ProtocolError, "9000"),
        ({"fingerprint": {"model": "x" * 5000}}, ProtocolError, "larger"),
    ],
)
def test_a_join_that_fits_nowhere_is_refused(
    tmp_path: Path, changes: dict[str, object], error: type[CutlayerError], match: str
) -> None:
    world = World(tmp_path)
    with pytest.raises(error, match=match):
        _join(world, "z", **changes)
    assert world.store.members() == []
    world.restart()
    world.add("a", "b", "c")


def test_who_is_not_listed_is_refused(tmp_path: Path) -> None:
    world = World(tmp_path / "one", members=["a", "b", "c"])
    with pytest.raises(PermissionRefused, match="z is not among the members"):
        _join(world, "z")
    world = World(tmp_path / "two", trunk="group", groups={"east": ["a"]})
    with pytest.raises(PermissionRefused, match="in no group"):
        _join(world, "z")


def test_a_member_that_joins_twice_is_one_member(tmp_path: Path) -> None:
    world = World(tmp_path, rounds=1)
    world.add("a", "b", "c")
    _join(world, "a")
    _join(world, "a")
    assert [row.name for row in world.store.members()] == ["a", "b", "c"]
    _others_finish(world, "a", "b", "c")


def test_calls_before_join_or_after_leave_are_refused(tmp_path: Path) -> None:
    world = World(tmp_path)
    call = EnterRound(federation="oncology", round=0, digest="", needs_state=True)
    with pytest.raises(ProtocolError, match="JOIN comes first"):
        world.coordinator.submit("a", call, {}, world.now_s)
    _join(world, "a")
    world.coordinator.leave("a", world.now_s)
    world.coordinator.leave("a", world.now_s)
    with pytest.raises(ProtocolError, match="JOIN comes first"):
        world.coordinator.submit("a", call, {}, world.now_s)


def _spoil(world: World, name: str, spoil: Callable[[ToyMember], None]) -> ToyMember:
    """Change a member's update on its way out; it is refused."""
    member = world.members[name]
    member.stops_before = lambda call: isinstance(call, SendUpdate)
    world.advance()
    world.pump()
    spoil(member)
    member.stops_before = lambda call: False
    member.poll()
    assert not member.is_alive
    return member


@pytest.mark.parametrize("wrong", ["nan", "inf", "shape", "missing", "extra", "weight"])
def test_a_malformed_update_is_refused_and_the_others_do_not_wait(
    tmp_path: Path, wrong: str
) -> None:
    world = World(tmp_path, rounds=1, quorum=3)
    world.add(*"abcd")

    def spoil(member: ToyMember) -> None:
        if wrong in ("nan", "inf"):
            member.tensors[A] = member.tensors[A] * math.inf * (0 if wrong == "nan" else 1)
        elif wrong == "shape":
            member.tensors[A] = member.tensors[A].T
        elif wrong == "missing":
            del member.tensors[A]
        elif wrong == "extra":
            member.tensors["layers.9.x"] = torch.zeros(1)
        else:
            assert isinstance(member.call, SendUpdate)
            member.call = msgspec.structs.replace(member.call, weight=-5)

    before_s = world.now_s + world.settings.gather_s
    member = _spoil(world, "b", spoil)
    assert isinstance(member.errors[-1], ProtocolError)
    assert "member b" in str(member.errors[-1])
    world.run_to(1)
    assert world.now_s == before_s
    _others_finish(world, "a", "c", "d")


def test_tokens_that_a_member_tells_the_trunk_weigh_no_more_than_its_update(
    tmp_path: Path,
) -> None:
    world = World(tmp_path, rounds=1, secure={"enabled": False, "max_weight": 50})
    update = TrunkUpdate(state=learnt("a", 1, TRUNK), weight=1 << 62)
    rules = Rules(world.settings, ENDS, TRUNK)
    taken = trunk_contributions(rules, {}, UpdateKind.DELTA, {"a": update})
    assert [x.weight for x in taken.updates] == [50]


@pytest.mark.parametrize("number", [1 << 63, (1 << 64) - 1])
def test_a_round_number_beyond_any_store_is_refused_as_any_other(
    tmp_path: Path, number: int
) -> None:
    world = World(tmp_path)
    world.add("a", "b", "c")
    world.run_to(1)
    enter = EnterRound(federation="oncology", round=number, digest="", needs_state=True)
    with pytest.raises(StorageError, match="knows round"):
        world.coordinator.submit("a", enter, {}, world.now_s)
    shown = Publish(federation="oncology", round=number, metrics={"loss": 1.0})
    with pytest.raises(ProtocolError, match="never began"):
        world.coordinator.publish("a", shown, world.now_s)


def test_a_huge_weight_counts_as_the_largest_allowed(tmp_path: Path) -> None:
    world = World(tmp_path, rounds=1, secure={"enabled": False, "max_weight": 1000})
    world.add(*"abc")
    member = world.members["a"]
    member.stops_before = lambda call: isinstance(call, SendUpdate)
    world.advance()
    world.pump()
    assert isinstance(member.call, SendUpdate)
    member.call = msgspec.structs.replace(member.call, weight=1 << 60)
    member.stops_before = lambda call: False
    world.run_to(1)
    assert world.store.rounds()[0].total_weight < 1200


def test_a_huge_update_ruins_a_mean_and_not_a_median(tmp_path: Path) -> None:
    """The documented threat of a lying member: choose a robust strategy against it."""
    largest = {}
    for kind in ("fedavg", "median"):
        world = World(tmp_path / kind, rounds=1, strategy={"kind": kind})
        world.add(*"abc")
        member = world.members["a"]
        member.stops_before = lambda call: isinstance(call, SendUpdate)
        world.advance()
        world.pump()
        member.tensors = {key: value * 1e9 for key, value in member.tensors.items()}
        member.stops_before = lambda call: False
        world.run_to(1)
        largest[kind] = max(float(world.final()[key].abs().max()) for key in ENDS)
    assert largest["fedavg"] > 1e6
    assert largest["median"] < 10


def test_two_processes_with_one_certificate_are_told_so(tmp_path: Path) -> None:
    world = World(tmp_path, rounds=1)
    world.add(*"abcd", stops_before=lambda call: isinstance(call, SendUpdate))
    world.advance()
    world.pump()
    member = world.members["a"]
    assert member.call is not None
    world.coordinator.submit("a", member.call, member.tensors, world.now_s)
    other = {key: value + 1 for key, value in member.tensors.items()}
    with pytest.raises(ProtocolError, match="two processes use its certificate"):
        world.coordinator.submit("a", member.call, other, world.now_s)
    for each in world.members.values():
        each.stops_before = lambda call: False
    _others_finish(world, *"abcd")


def _update_of(world: World, **changes: object) -> SendUpdate:
    call = SendUpdate(federation="oncology", round=1, attempt=1, weight=1)
    return msgspec.structs.replace(call, **changes)


def test_replayed_and_reordered_messages_change_nothing(tmp_path: Path) -> None:
    world = World(tmp_path, rounds=2)
    world.add("a", "b", "c")
    world.members["a"].stops_before = lambda call: isinstance(call, SendUpdate)
    world.advance()
    world.pump()
    replayed, tensors = world.members["a"].call, world.members["a"].tensors
    world.members["a"].stops_before = lambda call: False
    world.run_to(1)
    first = world.final()
    assert replayed is not None
    # Of the round that has just been finished: the same answer again, and no second effect.
    world.coordinator.submit("a", replayed, tensors, world.now_s)
    assert all(torch.equal(first[key], value) for key, value in world.final().items())
    world.run_to(2)
    with pytest.raises(StepExpired, match="attempt 1 of round 1 is over"):
        world.coordinator.submit("a", replayed, tensors, world.now_s)
    _others_finish(world, "a", "b", "c")


def test_messages_out_of_turn_are_refused(tmp_path: Path) -> None:
    world = World(tmp_path, rounds=1)
    world.add("a", "b", "c")
    with pytest.raises(ProtocolError, match="never began"):
        world.coordinator.submit("a", _update_of(world), {}, world.now_s)
    world.members["a"].stops_before = lambda call: isinstance(call, SendUpdate)
    world.advance()
    world.pump()
    keys = ShareKeys(
        federation="oncology", round=1, attempt=1, cipher_key=b"", mask_key=b"", certificate=b"",
        signature=b"",
    )  # fmt: skip
    with pytest.raises(ProtocolError, match="aggregates in the open"):
        world.coordinator.submit("a", keys, {}, world.now_s)
    early = Unmask(federation="oncology", round=1, attempt=1, seed_shares={}, key_shares={})
    with pytest.raises(ProtocolError, match="while UPDATES is open"):
        world.coordinator.submit("a", early, {}, world.now_s)
    _join(world, "z")
    with pytest.raises(ProtocolError, match="not in the cohort"):
        world.coordinator.submit("z", _update_of(world), {}, world.now_s)
    world.members["a"].stops_before = lambda call: False
    _others_finish(world, "a", "b", "c")


@pytest.mark.parametrize("changes", [{"attempt": 9}, {"attempt": 0}, {"round": 0}])
def test_a_round_that_never_began_is_called_forged(tmp_path: Path, changes: dict[str, int]) -> None:
    world = World(tmp_path, rounds=1)
    world.add("a", "b", "c")
    world.members["c"].stops_before = lambda call: isinstance(call, SendUpdate)
    world.advance()
    world.pump()
    with pytest.raises(ProtocolError, match="forged"):
        world.coordinator.submit("c", _update_of(world, **changes), {}, world.now_s)
    world.members["c"].stops_before = lambda call: False
    _others_finish(world, "a", "b", "c")


def test_a_coordinator_restored_from_a_backup_is_found_out_by_members_alone(
    tmp_path: Path,
) -> None:
    """Member a saw round 2; the restored store has only round 1. b and c go on with a newcomer."""
    world = World(tmp_path / "store", rounds=2)
    world.add("a", "b", "c")
    world.run_to(1)
    world.pump(1)
    world.store.close()
    backup = tmp_path / "backup"
    _copy(tmp_path / "store", backup)
    world.open()
    world.run_to(2)
    world.members["a"].round, world.members["a"].digest = 2, world.store.rounds()[-1].digest
    world.store.close()
    world.folder = backup
    world.open()
    ahead = EnterRound(
        federation="oncology", round=2, digest=world.members["a"].digest, needs_state=False
    )
    _join(world, "a")
    with pytest.raises(StorageError, match="restored from an older backup"):
        world.coordinator.submit("a", ahead, {}, world.now_s)
    with pytest.raises(StorageError, match="knows round 4"):
        world.coordinator.submit("a", _update_of(world, round=5), {}, world.now_s)
    world.members["a"].is_alive = False
    for name in "bc":
        world.members[name].is_finished = False
        world.members[name].round, world.members[name].digest = 0, ""
        world.members[name].restart()
    world.add("d")
    world.run_to(2)
    assert world.store.rounds()[-1].survivors == ["b", "c", "d"]


def _copy(source: Path, target: Path) -> None:
    target.mkdir(mode=0o700)
    for path in sorted(source.rglob("*")):
        copy = target / path.relative_to(source)
        if path.is_dir():
            copy.mkdir(mode=0o700)
        else:
            copy.write_bytes(path.read_bytes())
            copy.chmod(0o600)


@pytest.mark.parametrize("known_round", [0, 1])
def test_a_member_with_another_history_is_refused_at_once(tmp_path: Path, known_round: int) -> None:
    world = World(tmp_path, rounds=2)
    world.add("a", "b", "c")
    world.run_to(1)
    call = EnterRound(federation="oncology", round=known_round, digest="f" * 64, needs_state=False)
    with pytest.raises(ProtocolError, match=f"another round {known_round} than the coordinator"):
        world.coordinator.submit("c", call, {}, world.now_s)
    right = msgspec.structs.replace(call, digest=world.coordinator_digest(known_round))
    world.coordinator.submit("c", right, {}, world.now_s)
    _others_finish(world, "a", "b", "c")


@pytest.mark.parametrize(
    "changes",
    [
        {"metrics": {"loss": math.nan}},
        {"metrics": {"<script>": 1.0}},
        {"metrics": {f"m{i}": 1.0 for i in range(40)}},
        {"round": 7},
        {"federation": "other"},
    ],
)
def test_metrics_that_no_page_can_show_are_refused(
    tmp_path: Path, changes: dict[str, object]
) -> None:
    world = World(tmp_path)
    world.add("a")
    call = Publish(federation="oncology", round=1, metrics={"loss": 1.5})
    world.coordinator.publish("a", call, world.now_s)
    wrong: Publish = msgspec.structs.replace(call, **changes)
    with pytest.raises(ProtocolError):
        world.coordinator.publish("a", wrong, world.now_s)
    assert [(row.member, row.name, row.value) for row in world.store.metrics()] == [
        ("a", "loss", 1.5)
    ]


def test_a_members_metrics_of_a_round_are_few_over_all_its_calls(tmp_path: Path) -> None:
    world = World(tmp_path)
    world.add("a", "b")
    for name in ("a", "b"):
        many = Publish(federation="oncology", round=1, metrics={f"m{i}": 1.0 for i in range(30)})
        world.coordinator.publish(name, many, world.now_s)
        world.coordinator.publish(name, many, world.now_s)
        more = msgspec.structs.replace(many, metrics={f"n{i}": 1.0 for i in range(3)})
        with pytest.raises(ProtocolError, match="more than 32"):
            world.coordinator.publish(name, more, world.now_s)
    assert len(world.store.metrics()) == 60


def test_the_trunks_adapter_is_for_members_alone(tmp_path: Path) -> None:
    world = World(tmp_path)
    world.add("a", "b", "c")
    world.run_to(1)
    with pytest.raises(ProtocolError, match="eve is no member"):
        world.coordinator.trunk_state("eve")
    world.coordinator.leave("a", world.now_s)
    with pytest.raises(ProtocolError, match="a is no member"):
        world.coordinator.trunk_state("a")
    assert world.coordinator.trunk_state("b").keys() == TRUNK.keys()


def test_rounds_are_not_continued_under_other_rules(tmp_path: Path) -> None:
    world = World(tmp_path, rounds=1)
    world.add("a", "b", "c")
    world.run_to(1)
    chosen = world.settings.adapter.model_copy(update={"rank": 4})
    world.settings = world.settings.model_copy(update={"adapter": chosen})
    with pytest.raises(StorageError, match=r"federation\.adapter"):
        world.restart()


def test_a_full_disk_stops_the_federation_with_its_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = World(tmp_path, rounds=1)
    world.add("a", "b", "c")
    world.members["a"].stops_before = lambda call: isinstance(call, SendUpdate)
    world.advance()

    def fail(*arguments: object) -> None:
        raise StorageError("cannot write: No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(world.store, "commit_round", fail)
        world.members["a"].stops_before = lambda call: False
        world.pump()
    assert all("No space left" in str(m.errors[-1]) for m in world.members.values())
    assert world.coordinator.status().stopped
    world.restart()
    for member in world.members.values():
        member.restart()
    _others_finish(world, "a", "b", "c")


def test_settings_that_cannot_work_are_refused_when_they_are_read(tmp_path: Path) -> None:
    def refused(match: str, **table: object) -> None:
        with pytest.raises(ConfigError, match=match):
            World(tmp_path, **table)

    secure = {"enabled": True}
    for kind in ("svd", "median", "trimmed_mean"):
        refused("attested enclave", strategy={"kind": kind}, secure=secure)
    hidden = {"enabled": True, "hides_aggregate": True}
    refused("steps at the server", strategy={"kind": "every_step"}, secure=hidden)
    refused("needs secure.enabled", secure={"enabled": False, "hides_aggregate": True})
    refused("known: every_step, fedadam", strategy={"kind": "fedsgd"})
    refused("below quorum", cohort=2)
    refused("secure aggregation needs 3", secure=secure, quorum=2)
    refused("could never end", quorum=5)
    refused("only to it", trunk="group")
    refused("exactly one group", trunk="group", groups={"x": ["a"], "y": ["a"]})
    refused("in none", trunk="group", groups={"x": ["a"]}, members=["a", "b"])


def test_an_unexpected_header_is_no_call_of_a_round(tmp_path: Path) -> None:
    world = World(tmp_path)
    world.add("a")

    class Strange(Header, frozen=True, kw_only=True):
        federation: str = "oncology"

    with pytest.raises(ProtocolError, match="Strange"):
        world.coordinator.submit("a", Strange(), {}, world.now_s)
