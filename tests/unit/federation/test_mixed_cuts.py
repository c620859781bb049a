"""A federation whose members have different cuts: its rounds, its refusals, its store."""

import sqlite3
from pathlib import Path

import msgspec
import pytest
import torch

from cutlayer.errors import (
    ConfigError,
    ProtocolError,
    SpecMismatch,
    StorageError,
)
from cutlayer.federation.chain import first_digest, next_digest, payload_digest
from cutlayer.federation.cuts import fill
from cutlayer.federation.settings import FederationSettings
from cutlayer.federation.state import Layout
from cutlayer.federation.store import FederationStore
from cutlayer.model.adapters import AdapterState, initial_state
from cutlayer.model.cut import Cut
from cutlayer.settings import parse_settings
from cutlayer.wire.federation_messages import EnterRound, Join, SendUpdate, Unmask
from tests.unit.federation.cuts_world import CUTS, WHOLE, CutWorld, greeting, joining
from tests.unit.federation.rounds_world import FINGERPRINT, World

NAMES = tuple(CUTS)
SECURE = {"secure": {"enabled": True}}
OPEN = {"secure": {"enabled": False}}


def _close(found: AdapterState, wanted: AdapterState) -> None:
    assert found.keys() == wanted.keys()
    for key in wanted:
        torch.testing.assert_close(found[key], wanted[key], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("table", [OPEN, SECURE], ids=["open", "secure"])
def test_rounds_are_weighted_means_wherever_a_key_was_trained(
    tmp_path: Path, table: dict[str, object]
) -> None:
    world = CutWorld(tmp_path, **table)
    members = world.enter(*NAMES)
    world.run_to(3)
    world.pump()
    _close(world.final(), world.plain_mean([NAMES] * 3))
    for member in members:
        assert member.is_finished
        _close(member.received, world.final())


@pytest.mark.parametrize("kind", ["median", "trimmed_mean", "svd"])
def test_robust_rules_see_every_key_of_every_member(tmp_path: Path, kind: str) -> None:
    """As if all had one cut: where a member's key was trained makes no difference."""
    found = []
    for number, cuts in enumerate((CUTS, dict.fromkeys(NAMES, Cut(1, 5)))):
        world = CutWorld(tmp_path / str(number), rounds=1, strategy={"kind": kind})
        world.enter(*NAMES, cuts=cuts)
        world.run_to(1)
        found.append(world.final())
    _close(found[0], found[1])


@pytest.mark.parametrize("table", [OPEN, SECURE], ids=["open", "secure"])
def test_gradients_are_summed_over_all_tokens_wherever_they_were_taken(
    tmp_path: Path, table: dict[str, object]
) -> None:
    strategy = {"kind": "every_step", "lr": 0.01}
    found = []
    for number, cuts in enumerate((CUTS, dict.fromkeys(NAMES, Cut(1, 5)))):
        world = CutWorld(tmp_path / str(number), rounds=2, strategy=strategy, **table)
        world.enter(*NAMES, cuts=cuts)
        world.run_to(2)
        found.append(world.final())
    for key, wanted in found[1].items():
        torch.testing.assert_close(found[0][key], wanted, rtol=1e-5, atol=1e-5)


def test_every_member_is_told_the_whole_state_and_one_chain(tmp_path: Path) -> None:
    world = CutWorld(tmp_path)
    members = world.enter(*NAMES)
    world.run_to(2)
    world.pump()
    first = payload_digest(initial_state(WHOLE, 0))
    digest = first_digest("oncology", first)
    for number in (1, 2):
        row = world.store.round_row(number)
        assert row is not None
        digest = next_digest(digest, "oncology", number, row.payload_digest)
        assert row.digest == digest
    for member in members:
        assert member.rounds[0].payload_digest == first
        assert member.rounds[2].digest == digest
        assert member.rounds[0].cuts == {n: [c.lower, c.upper] for n, c in CUTS.items()}


def test_a_member_s_run_starts_from_the_blocks_that_its_cut_leaves_the_server(
    tmp_path: Path,
) -> None:
    world = CutWorld(tmp_path)
    world.enter(*NAMES)
    world.advance()
    states = next(iter(world.trunk.begun.values()))
    for name, cut in CUTS.items():
        assert {int(key.split(".")[4]) for key in states[name]} == set(cut.trunk)


def test_cuts_survive_the_coordinator(tmp_path: Path) -> None:
    world = CutWorld(tmp_path)
    world.enter(*NAMES)
    world.run_to(1)
    world.restart()
    world.run_to(3)
    _close(world.final(), world.plain_mean([NAMES] * 3))
    assert FederationStore.read_only(tmp_path).cuts() == CUTS


@pytest.mark.parametrize("table", [OPEN, SECURE], ids=["open", "secure"])
def test_a_member_that_left_comes_back_with_another_cut(
    tmp_path: Path, table: dict[str, object]
) -> None:
    world = CutWorld(tmp_path, **table)
    world.enter(*NAMES)
    world.run_to(1)
    world.coordinator.leave("d", world.now_s)
    del world.members["d"]
    world.run_to(2)
    world.enter("d", cuts={"d": Cut(2, 3)})
    world.run_to(3)
    assert world.members["a"].rounds[-1].cuts["d"] == [2, 3]
    rows = [row.survivors for row in world.store.rounds()]
    assert rows[0] == rows[2] == list(NAMES)
    _close(world.final(), world.plain_mean(rows))


def test_a_new_cut_in_the_middle_of_an_attempt_waits_for_the_next(tmp_path: Path) -> None:
    world = CutWorld(tmp_path, rounds=2, min_members=4, gather_s=0)
    world.enter(*NAMES)
    world.members["d"].stops_before = lambda call: isinstance(call, SendUpdate)
    world.pump(1)
    world.enter("d", cuts={"d": Cut(4, 5)})
    world.run_to(2)
    rows = [row.survivors for row in world.store.rounds()]
    assert rows == [["a", "b", "c"], list(NAMES)]
    _close(world.final(), world.plain_mean(rows))


@pytest.mark.parametrize("gone", ["a", "d"])
def test_who_drops_out_of_secure_aggregation_counts_nowhere(tmp_path: Path, gone: str) -> None:
    """`d` alone holds block 2 at its client: without it the server's runs are its mean."""
    world = CutWorld(tmp_path, rounds=1, min_members=4, quorum=3, **SECURE)
    world.enter(*NAMES)
    world.members[gone].stops_before = lambda call: isinstance(call, SendUpdate)
    world.run_to(1)
    left = [name for name in NAMES if name != gone]
    assert world.store.rounds()[-1].survivors == left
    _close(world.final(), world.plain_mean([left]))


def test_who_vanishes_before_unmasking_counts_with_its_blocks(tmp_path: Path) -> None:
    world = CutWorld(tmp_path, rounds=1, **SECURE)
    world.enter(*NAMES)
    world.members["d"].stops_before = lambda call: isinstance(call, Unmask)
    world.run_to(1)
    _close(world.final(), world.plain_mean([NAMES]))


@pytest.mark.parametrize("kind", ["fedavg", "every_step"])
@pytest.mark.parametrize(("claimed", "value_range"), [(-0.9, 1.0), (40.0, 64.0)])
def test_who_lies_about_its_share_of_a_block_moves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, claimed: float, value_range: float
) -> None:
    """A share near zero would make a mean of any size, one below zero turn it around."""

    def lies(update: AdapterState, layout: Layout, cut: Cut) -> AdapterState:
        filled = fill(update, layout, cut)
        if cut == CUTS["d"]:
            filled["share.block.4"] = torch.tensor([claimed])
        return filled

    monkeypatch.setattr("tests.unit.federation.cuts_world.fill", lies)
    strategy = {"kind": kind, "lr": 0.01}
    secure = {"enabled": True, "value_range": value_range}
    world = CutWorld(tmp_path, rounds=1, max_attempts=1, strategy=strategy, secure=secure)
    world.enter(*NAMES)
    world.advance()
    world.pump()
    assert "a member sent a wrong vector" in world.coordinator.status().stopped
    assert not world.store.rounds()


def test_a_replica_that_lost_a_member_s_run_leaves_its_client_s_blocks(tmp_path: Path) -> None:
    world = CutWorld(tmp_path, rounds=1)
    world.enter(*NAMES)
    world.trunk.poisoned.add("nobody")
    collect = world.trunk.collect

    def lossy(run_id, members, kind):  # type: ignore[no-untyped-def]
        return {name: x for name, x in collect(run_id, members, kind).items() if name != "a"}

    world.trunk.collect = lossy  # type: ignore[method-assign]
    world.run_to(1)
    whole, without = world.plain_mean([NAMES]), world.plain_mean([["b", "c", "d"]])
    for key, found in world.final().items():
        wanted = without if int(key.split(".")[4]) in CUTS["a"].trunk else whole
        torch.testing.assert_close(found, wanted[key], rtol=1e-6, atol=1e-6)


def _renamed(call: Join, cut: str) -> Join:
    return msgspec.structs.replace(call, fingerprint={**call.fingerprint, "cut": cut})


def test_cuts_that_do_not_fit_are_refused_to_that_member_alone(tmp_path: Path) -> None:
    world = CutWorld(tmp_path, rounds=1)
    join, now_s = world.coordinator.join, world.now_s
    world.enter("a", "b", "c")
    cut = Cut(2, 4)
    with pytest.raises(SpecMismatch, match=r"0:4 of eve reaches beyond the blocks 1:5"):
        join("eve", joining(Cut(0, 4)), now_s, greeting(Cut(0, 4)))
    with pytest.raises(ProtocolError, match=r"joins with the cut 2:4.*greeted with 3:4"):
        join("eve", joining(cut), now_s, greeting(Cut(3, 4)))
    for text in ("", "2", "4:2", "2:2", "x:y", "2:4:6", "2:99999999999999"):
        with pytest.raises(ProtocolError, match="cut"):
            join("eve", _renamed(joining(cut), text), now_s, greeting(cut))
    fewer = msgspec.structs.replace(joining(cut), layout=joining(Cut(1, 4)).layout)
    with pytest.raises(SpecMismatch, match="absent, by its cut 2:4 it is"):
        join("eve", fewer, now_s, greeting(cut))
    more = msgspec.structs.replace(joining(cut), layout=joining(Cut(3, 4)).layout)
    with pytest.raises(SpecMismatch, match="by its cut 2:4 it is at the server"):
        join("eve", more, now_s, greeting(cut))
    with pytest.raises(SpecMismatch, match="weights: other, the federation has root"):
        join("eve", joining(cut), now_s, greeting(cut, root="other"))
    layout = {**joining(cut).layout, "share.block.2": [1]}
    with pytest.raises(ProtocolError, match="reserved names"):
        join("eve", msgspec.structs.replace(joining(cut), layout=layout), now_s, greeting(cut))
    world.run_to(1)
    _close(world.final(), world.plain_mean([["a", "b", "c"]]))


def test_other_ends_are_refused_whatever_the_cut(tmp_path: Path) -> None:
    world = CutWorld(tmp_path, rounds=1)
    world.enter("a", "b", "c")
    call = joining(Cut(2, 4))
    key = next(iter(call.layout))
    other = msgspec.structs.replace(call, layout={**call.layout, key: [3, 6]})
    with pytest.raises(SpecMismatch, match=r"differs in 1 tensors.*\[3, 6\]"):
        world.coordinator.join("eve", other, world.now_s, greeting(Cut(2, 4)))


def test_an_update_has_the_keys_of_its_member_s_cut(tmp_path: Path) -> None:
    world = CutWorld(tmp_path, rounds=1, min_members=4, gather_s=0)
    members = world.enter(*NAMES)
    members[3].stops_before = lambda call: isinstance(call, SendUpdate)
    world.pump(1)
    liar = members[3]
    assert isinstance(liar.call, SendUpdate)
    extra = {**liar.tensors, next(k for k in WHOLE if ".3." in k): torch.zeros(2, 6)}
    with pytest.raises(ProtocolError, match="1 unknown"):
        world.coordinator.submit("d", liar.call, extra, world.now_s)


def test_without_mixed_cuts_one_cut_is_everybody_s(tmp_path: Path) -> None:
    world = World(tmp_path)
    world.add("a")
    with pytest.raises(SpecMismatch, match=r"cut: 2:3, .* 1:3;.*mixed_cuts=true"):
        world.add("b", fingerprint={**world.members["a"].fingerprint, "cut": "2:3"})
    joined = world.members["a"]
    joined.poll()
    assert "mixed_cuts" not in world.settings.policy().told()
    assert "mixed_cuts" in CutWorld(tmp_path / "other").settings.policy().told()


def test_without_mixed_cuts_nobody_joins_with_less_than_the_server_s_blocks(tmp_path: Path) -> None:
    """A member that trains nothing at its client brings no layout that would show its cut."""
    world = World(tmp_path)
    call = Join(federation="oncology", fingerprint={**FINGERPRINT, "cut": "1:5"}, layout={})
    for cut in (Cut(2, 4), Cut(1, 4)):
        with pytest.raises(SpecMismatch, match=rf"{cut.upper} and .* blocks 1:5 as one"):
            world.coordinator.join("eve", call, world.now_s, greeting(cut))
    assert world.store.pinned() is None
    world.coordinator.join("a", call, world.now_s, greeting(Cut(1, 5)))


def test_whose_cut_is_not_known_joins_first(tmp_path: Path) -> None:
    """Members of the time before the operator allowed different cuts."""
    world = CutWorld(tmp_path)
    world.enter(*NAMES)
    world.store._database._connection.execute("DELETE FROM cuts")
    world.restart()
    call = EnterRound(federation="oncology", round=0, digest="", needs_state=True)
    with pytest.raises(ProtocolError, match="JOIN comes first"):
        world.coordinator.submit("a", call, {}, world.now_s)


@pytest.mark.parametrize(
    ("table", "why"),
    [
        ({"adapter": {"parts": ["head", "tail"]}}, "needs adapter.parts with all"),
        ({"trunk": "client"}, "needs trunk = 'shared'"),
        ({"secure": {"hides_aggregate": True}}, "cannot hide the aggregate"),
        ({"secure": {"value_range": 0.5}}, "value_range of at least 1"),
    ],
)
def test_settings_that_different_cuts_cannot_have_are_refused(
    table: dict[str, object], why: str
) -> None:
    with pytest.raises(ConfigError, match=why):
        parse_settings(
            FederationSettings, {"name": "x", "rounds": 1, "mixed_cuts": True, **table}, "test"
        )


def test_mixed_cuts_cannot_be_turned_on_or_off_once_a_round_is_finished(tmp_path: Path) -> None:
    world = CutWorld(tmp_path)
    world.enter(*NAMES)
    world.run_to(1)
    world.store.close()
    with pytest.raises(StorageError, match=r"federation\.mixed_cuts; set them back"):
        World(tmp_path)


def test_before_the_first_round_they_can(tmp_path: Path) -> None:
    world = CutWorld(tmp_path)
    world.enter(*NAMES)
    world.store.close()
    other = World(tmp_path, secure={"enabled": False})
    assert other.store.pinned() is None
    other.store.close()


def test_a_store_of_an_earlier_release_has_no_cuts_and_opens(tmp_path: Path) -> None:
    FederationStore(tmp_path, "oncology").close()
    with sqlite3.connect(tmp_path / "federation.sqlite") as connection:
        connection.execute("DROP TABLE cuts")
    assert FederationStore.read_only(tmp_path).cuts() == {}
    with FederationStore(tmp_path, "oncology") as store:
        store.keep_cut("a", Cut(1, 3))
        store.keep_cut("a", Cut(2, 3))
        assert store.cuts() == {"a": Cut(2, 3)}
