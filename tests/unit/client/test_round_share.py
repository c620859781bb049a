"""What a member with a cut of its own refuses of a round, and what it hands in where it may."""

from collections.abc import Mapping

import msgspec
import pytest
import torch

from cutlayer.client.federation_link import FederationLink
from cutlayer.client.handing_in import Credentials, Handover
from cutlayer.client.round_share import Adapters, check_mixed, round_share
from cutlayer.errors import ConfigError, ProtocolError, QuorumNotMet
from cutlayer.federation.cuts import block_of, client_part, fill, vector_layout, write_cuts
from cutlayer.federation.settings import FederationSettings
from cutlayer.federation.state import flatten, num_values
from cutlayer.model.adapters import initial_state
from cutlayer.model.cut import Cut
from cutlayer.wire.federation_messages import Round, UpdateTaken
from tests.unit.federation.cuts_world import CUTS, WHOLE

STATE = initial_state(WHOLE, 0)


def _begun(cuts: Mapping[str, Cut] = CUTS) -> Round:
    return Round(
        round=1,
        attempt=1,
        is_finished=False,
        cohort=sorted(cuts),
        digest="00",
        payload_digest="",
        survivors=[],
        total_weight=0,
        cuts=write_cuts(cuts),
    )


def _adapters(cut: Cut) -> Adapters:
    return Adapters(layout=client_part(WHOLE, cut), cut=cut)


def _handover(name: str, min_holders: int, cuts: Mapping[str, Cut] = CUTS) -> Handover:
    table = {"name": "trial", "rounds": 1, "mixed_cuts": True}
    policy = FederationSettings.model_validate(table).policy()
    who = Credentials(name=name, signer=None, verifier=None, group_key=None)
    share = round_share(_adapters(cuts[name]), _begun(cuts), STATE, freezes_a=False)
    return Handover(
        FederationLink.__new__(FederationLink), policy, _begun(cuts), who, share, min_holders
    )


def test_all_members_lay_their_vectors_out_alike() -> None:
    shares = [
        round_share(_adapters(cut), _begun(), STATE, freezes_a=False) for cut in CUTS.values()
    ]
    for share in shares:
        assert share.vector == vector_layout(WHOLE, CUTS)
        assert share.update == client_part(WHOLE, share.cut)
    frozen = round_share(_adapters(CUTS["d"]), _begun(), STATE, freezes_a=True)
    assert not any(".lora_A." in key for key in (*frozen.update, *frozen.vector))


def test_tensors_that_a_server_invents_would_part_one_update_from_the_sum() -> None:
    """Why all sign how their vectors are laid out: the same places are other keys to the victim."""
    ends = {key: shape for key, shape in WHOLE.items() if block_of(key) == 0}
    fakes = {place: {f"{place}.weight": [num_values(ends)]} for place in ("AAA", "zzz")}
    cut, learnt = Cut(1, 5), initial_state(ends, 3)
    begun, own = _begun(dict.fromkeys("abcd", cut)), Adapters(layout=dict(ends), cut=cut)
    summed, layouts = torch.zeros(2 * num_values(ends)), []
    for name in "abcd":
        fake = fakes["zzz" if name == "a" else "AAA"]
        told = {**initial_state(ends, 0), **initial_state(fake, 0)}
        share = round_share(own, begun, told, freezes_a=False)
        check_mixed(name, own, begun, told)
        summed += flatten(fill(learnt, share.vector, cut), share.vector)
        layouts.append(share.vector)
    torch.testing.assert_close(summed[: num_values(ends)], flatten(learnt, ends))
    assert layouts[0] != layouts[1] == layouts[2]


def test_a_block_that_too_few_hold_is_not_handed_in() -> None:
    """Of these four, `d` alone has block 2 at its client: the sum of block 2 is its update."""
    for name, least in (("a", 3), ("b", 3), ("c", 2), ("d", 1)):
        _handover(name, least)
    with pytest.raises(ConfigError, match=r"block 2 is trained at 1 clients.*min_cohort=2.*Re-cut"):
        _handover("d", 2)
    with pytest.raises(ConfigError, match=r"block 4 is trained at 2 clients.*min_cohort=3"):
        _handover("c", 3)


def test_only_members_whose_survival_shows_count_for_a_block() -> None:
    """In a large cohort a member hears of its neighbours alone."""
    cuts = {f"m{number:03}": Cut(1, 5) for number in range(200)}
    cuts |= {f"m{number:03}": Cut(2, 5) for number in range(0, 200, 40)}
    own = next(iter(cuts))
    with pytest.raises(ConfigError, match="that this owner can see"):
        _handover(own, 5, cuts)
    _handover(own, 1, cuts)


def test_nothing_is_revealed_where_too_few_of_a_block_s_updates_came() -> None:
    cuts = {"a": Cut(1, 5), "b": Cut(1, 5), "c": Cut(2, 5), "d": Cut(2, 5), "e": Cut(2, 5)}
    handover = _handover("c", 3, cuts)
    came = UpdateTaken(survivors=["a", "b", "d", "e"], dropped=[], is_secure=True)
    handover._check_survivors(came)
    fewer = UpdateTaken(survivors=["a", "b", "d"], dropped=["e"], is_secure=True)
    with pytest.raises(QuorumNotMet, match=r"block 1 is in 2 of the updates.*reveals nothing"):
        handover._check_survivors(fewer)


@pytest.mark.parametrize("least", [1, 3])
def test_who_does_not_hold_a_block_helps_nobody_to_open_it_alone(least: int) -> None:
    """Members without the block are a threshold by themselves: the holders' refusal is not enough.

    Of six that lack block 1 at their client and three that have it, two vanish after all handed in:
    what is left of the sum at block 1 is the third one's update.
    """
    cuts = dict.fromkeys("abcdef", Cut(1, 5)) | dict.fromkeys("xyz", Cut(2, 5))
    handover = _handover("a", least, cuts)
    for gone in ("", "b", "bcd", "xyz"):
        came = sorted(set("bcdefxyz") - set(gone))
        handover._check_survivors(UpdateTaken(survivors=came, dropped=sorted(gone), is_secure=True))
    for gone in ("y", "yz"):
        came = sorted(set("bcdefxyz") - set(gone))
        with pytest.raises(QuorumNotMet, match=rf"block 1 is in {3 - len(gone)} of the updates"):
            handover._check_survivors(
                UpdateTaken(survivors=came, dropped=sorted(gone), is_secure=True)
            )


def test_a_block_that_few_hold_from_the_beginning_stops_nobody_else() -> None:
    """`z` alone has block 1 and accepts it: others need not, and cannot be stopped by it."""
    cuts = dict.fromkeys("abc", Cut(1, 5)) | {"z": Cut(2, 5)}
    for survivors in (["b", "c", "z"], ["b", "z"], ["b", "c"]):
        dropped = sorted(set("bcz") - set(survivors))
        taken = UpdateTaken(survivors=survivors, dropped=dropped, is_secure=True)
        _handover("a", 2, cuts)._check_survivors(taken)


def test_nothing_is_handed_in_where_a_block_s_other_holders_shared_no_secrets() -> None:
    cuts = {"a": Cut(1, 5), "b": Cut(1, 5), "c": Cut(2, 5), "d": Cut(2, 5), "e": Cut(2, 5)}
    handover = _handover("c", 3, cuts)
    handover._check_partners(["a", "b", "d", "e"])
    with pytest.raises(QuorumNotMet, match="block 1 is trained at 2 clients of those who shared"):
        handover._check_partners(["a", "b", "d"])
    _handover("a", 3, cuts)._check_partners(["b", "d", "e"])


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"cuts": write_cuts({**CUTS, "d": Cut(2, 4)})}, "another cut than 3:4"),
        ({"cuts": {}}, "does not say one cut for each"),
        ({"cuts": {**write_cuts(CUTS), "eve": [1, 2]}}, "does not say one cut for each"),
        ({"cuts": {**write_cuts(CUTS), "a": [5, 1]}}, "cut of a"),
    ],
)
def test_a_round_that_says_other_cuts_is_refused(changes: dict[str, object], why: str) -> None:
    begun = msgspec.structs.replace(_begun(), **changes)
    with pytest.raises(ProtocolError, match=why):
        check_mixed("d", _adapters(CUTS["d"]), begun, STATE)


def test_a_round_without_the_member_s_own_adapters_is_refused() -> None:
    own = _adapters(CUTS["d"])
    check_mixed("d", own, _begun(), STATE)
    for key in own.layout:
        lacking = {name: x for name, x in STATE.items() if name != key}
        for told in (lacking, {**lacking, key: torch.zeros(7)}):
            with pytest.raises(ProtocolError, match="came without this member's adapters"):
                check_mixed("d", own, _begun(), told)
    with pytest.raises(ProtocolError, match="of other names"):
        check_mixed("d", own, _begun(), {**STATE, "share.block.2": torch.ones(1)})
