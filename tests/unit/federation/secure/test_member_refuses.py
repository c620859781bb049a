"""What a member refuses: anything with which a server that lies could learn more than the sum."""

import dataclasses
from collections.abc import Mapping

import msgspec
import pytest
import torch
from msgspec.structs import replace

from cutlayer.errors import (
    ConfigError,
    DataError,
    PermissionRefused,
    ProtocolError,
    QuorumNotMet,
)
from cutlayer.federation.secure.masks import agreed_key
from cutlayer.federation.secure.member import SecureMember
from cutlayer.federation.secure.ring import dequantise
from cutlayer.federation.secure.shares import NO_BUNDLE, seal_envelope
from cutlayer.federation.settings import SecureSettings
from cutlayer.identity.provision import local
from cutlayer.identity.signing import CertificateVerifier, KitSigner
from cutlayer.model.cut import Cut
from cutlayer.wire.federation_messages import PeerKeys, PeerSecrets, UpdateTaken
from tests.unit.federation.secure.crowd import Crowd, attempt_of, names, plain_mean, updates

_VALUES = torch.zeros(5)


@pytest.fixture
def crowd() -> Crowd:
    """Four who have sent keys."""
    made = Crowd(attempt_of(names(4)))
    made.send_keys()
    return made


@pytest.fixture
def masked(crowd: Crowd) -> Crowd:
    """Four who have sent updates; owner3's did not come."""
    cohort = crowd.send_secrets(names(4))
    crowd.send_updates(cohort, updates(cohort), ["owner3"])
    return crowd


Credentials = Mapping[str, tuple[KitSigner, CertificateVerifier]]


@pytest.fixture(scope="module")
def credentials(tmp_path_factory: pytest.TempPathFactory) -> Credentials:
    """Three with certificates of one authority."""
    made = local(tmp_path_factory.mktemp("owners") / "keys", names(3))
    return {
        name: (
            KitSigner(kit / "certificate.pem", kit / "key.pem"),
            CertificateVerifier(kit / "authority.pem", kit / "revoked.pem"),
        )
        for name, kit in made.clients.items()
    }


def signed_crowd(credentials: Credentials, attempt_number: int = 1) -> Crowd:
    return Crowd(attempt_of(names(3), number=attempt_number), credentials=credentials)


def test_signed_members_reach_the_sum(credentials: Credentials) -> None:
    crowd = signed_crowd(credentials)
    _, survivors = crowd.run(updates(names(3)))
    assert survivors == names(3)


def first_keys(crowd: Crowd) -> PeerKeys:
    crowd.send_keys()
    return crowd.server.peer_keys("owner0")


def test_swapped_keys_are_refused(credentials: Credentials) -> None:
    """The server puts a key of its own between two members."""
    crowd = signed_crowd(credentials)
    keys, own = first_keys(crowd), SecureMember("owner1", crowd.attempt, 5)
    for name in ("cipher_key", "mask_key"):
        forged = replace(keys.peers[0], **{name: getattr(own.share_keys(), name)})
        lie = replace(keys, peers=[forged, keys.peers[1]])
        with pytest.raises(PermissionRefused, match="signature is not owner1's"):
            crowd.members["owner0"].share_secrets(lie)
    crowd.members["owner0"].share_secrets(keys)


def test_keys_of_another_member_under_a_name_are_refused(credentials: Credentials) -> None:
    crowd = signed_crowd(credentials)
    keys = first_keys(crowd)
    lie = replace(keys, peers=[keys.peers[0], replace(keys.peers[0], member="owner2")])
    with pytest.raises(PermissionRefused, match="owner2 showed the certificate of owner1"):
        crowd.members["owner0"].share_secrets(lie)


@pytest.mark.parametrize("missing", ["certificate", "signature"])
def test_unsigned_keys_are_refused(credentials: Credentials, missing: str) -> None:
    crowd = signed_crowd(credentials)
    keys = first_keys(crowd)
    lie = replace(keys, peers=[replace(keys.peers[0], **{missing: b""}), keys.peers[1]])
    with pytest.raises(PermissionRefused, match="keys of owner1 are not signed"):
        crowd.members["owner0"].share_secrets(lie)


def test_keys_of_another_attempt_are_refused(credentials: Credentials) -> None:
    first, second = (signed_crowd(credentials, number) for number in (1, 2))
    old = first_keys(first)
    first_keys(second)
    with pytest.raises(PermissionRefused, match="forged or changed"):
        second.members["owner0"].share_secrets(old)


def test_a_server_cannot_tell_members_different_cohorts_or_policies(
    credentials: Credentials,
) -> None:
    """The cohort and the policy are in every signature."""
    crowd = signed_crowd(credentials)
    keys = first_keys(crowd)
    for cohort, policy in [
        ([*names(3), "owner9"], None),
        (names(3), SecureSettings(threshold=0.6)),
    ]:
        told = attempt_of(cohort, policy)
        misled = SecureMember("owner0", told, 5, *crowd.credentials["owner0"])
        with pytest.raises(PermissionRefused, match="forged or changed"):
            misled.share_secrets(replace(keys, threshold=told.threshold))


def test_a_server_cannot_tell_members_different_cuts(credentials: Credentials) -> None:
    """Else it could have one vector laid out so that a block is in it alone."""
    crowd = signed_crowd(credentials)
    keys = first_keys(crowd)
    for cuts in ({name: Cut(1, 3) for name in names(3)}, {"owner1": Cut(2, 3)}):
        told = dataclasses.replace(crowd.attempt, cuts=cuts)
        misled = SecureMember("owner0", told, 5, *crowd.credentials["owner0"])
        with pytest.raises(PermissionRefused, match="forged or changed"):
            misled.share_secrets(keys)


def test_a_server_cannot_lay_one_member_s_vector_out_in_another_way(
    credentials: Credentials,
) -> None:
    """By telling others tensors that nobody has: one member's update would meet their zeros."""
    crowd = signed_crowd(credentials)
    crowd.attempt = dataclasses.replace(
        crowd.attempt, cuts=dict.fromkeys(names(3), Cut(1, 3)), vector={"a": [5], "z": [5]}
    )
    crowd.members = {
        name: SecureMember(name, crowd.attempt, 10, *crowd.credentials[name]) for name in names(3)
    }
    keys = first_keys(crowd)
    crowd.members["owner0"].share_secrets(keys)
    told = dataclasses.replace(crowd.attempt, vector={"A": [5], "a": [5]})
    misled = SecureMember("owner0", told, 10, *crowd.credentials["owner0"])
    with pytest.raises(PermissionRefused, match="forged or changed"):
        misled.share_secrets(keys)


def test_a_member_signs_and_verifies_or_neither(credentials: Credentials) -> None:
    crowd = signed_crowd(credentials)
    signer, verifier = crowd.credentials["owner0"]
    for pair in ((signer, None), (None, verifier)):
        with pytest.raises(ConfigError, match="either signs and verifies"):
            SecureMember("owner0", crowd.attempt, 5, *pair)


@pytest.mark.parametrize("threshold", [1, 2, 4])
def test_another_threshold_than_the_policys_is_refused(crowd: Crowd, threshold: int) -> None:
    keys = replace(crowd.server.peer_keys("owner0"), threshold=threshold)
    with pytest.raises(ProtocolError, match=f"{threshold} shares open a secret.* policy 3"):
        crowd.members["owner0"].share_secrets(keys)


def test_a_shrunken_graph_is_refused(crowd: Crowd) -> None:
    keys = crowd.server.peer_keys("owner0")
    with pytest.raises(QuorumNotMet, match="1 of owner0's 3 neighbours sent keys"):
        crowd.members["owner0"].share_secrets(replace(keys, peers=keys.peers[:1]))


def test_neighbours_are_not_the_servers_choice() -> None:
    cohort = names(12)
    crowd = Crowd(attempt_of(cohort, SecureSettings(neighbours=4)))
    keys = first_keys(crowd)
    around = crowd.attempt.graph.neighbours("owner0")
    far = next(name for name in cohort[1:] if name not in around)
    lie = replace(keys, peers=[*keys.peers[1:], replace(keys.peers[0], member=far)])
    with pytest.raises(ProtocolError, match=f"none of owner0's: {far}"):
        crowd.members["owner0"].share_secrets(lie)


def test_a_neighbour_named_twice_is_refused(crowd: Crowd) -> None:
    keys = crowd.server.peer_keys("owner0")
    with pytest.raises(ProtocolError, match="one name twice"):
        crowd.members["owner0"].share_secrets(replace(keys, peers=[*keys.peers, keys.peers[0]]))


@pytest.mark.parametrize("key", [b"", bytes(31), bytes(32)])
def test_a_key_that_is_none_is_refused(crowd: Crowd, key: bytes) -> None:
    keys = crowd.server.peer_keys("owner0")
    lie = replace(keys, peers=[replace(keys.peers[0], cipher_key=key), *keys.peers[1:]])
    with pytest.raises(ProtocolError, match="owner1 sent a public key that is none"):
        crowd.members["owner0"].share_secrets(lie)


def received(crowd: Crowd) -> PeerSecrets:
    crowd.send_secrets(names(4))
    return crowd.server.peer_secrets("owner0")


def _take_spoilt(crowd: Crowd, sealed: Mapping[str, bytes], lie: bytes) -> None:
    """One spoilt envelope of three is nobody's end; it counts as none."""
    member = crowd.members["owner0"]
    without = {name: data for name, data in sealed.items() if name != "owner1"}
    with pytest.raises(QuorumNotMet, match=r"those of owner2 are not for it"):
        member.take_secrets(PeerSecrets(sealed={**without, "owner2": lie}))
    member.take_secrets(PeerSecrets(sealed={**sealed, "owner2": lie}))
    assert member._bundles["owner2"] == NO_BUNDLE
    assert NO_BUNDLE not in (member._bundles["owner1"], member._bundles["owner3"])


@pytest.mark.parametrize("at", [0, 20, -1])
def test_changed_shares_are_not_used(crowd: Crowd, at: int) -> None:
    sealed = dict(received(crowd).sealed)
    changed = bytearray(sealed["owner2"])
    changed[at] ^= 1
    _take_spoilt(crowd, sealed, bytes(changed))


@pytest.mark.parametrize("is_own", [True, False])
def test_shares_for_another_or_from_another_are_not_used(crowd: Crowd, is_own: bool) -> None:
    sealed = dict(received(crowd).sealed)
    others = crowd.server.peer_secrets("owner1").sealed
    _take_spoilt(crowd, sealed, sealed["owner1"] if is_own else others["owner2"])


@pytest.mark.parametrize(
    "content",
    [b"", b"\x01", msgspec.msgpack.encode(replace(NO_BUNDLE, seed=bytes(90_000)))],
    ids=["empty", "no bundle", "huge"],
)
def test_what_is_no_share_inside_a_good_envelope_is_not_used(crowd: Crowd, content: bytes) -> None:
    """Else one member could end every neighbour's run, or blow up what it reveals."""
    sealed, liar = dict(received(crowd).sealed), crowd.members["owner2"]
    binding = crowd.attempt.binding("shares", "owner2", "owner0")
    receiver = liar._peers["owner0"].cipher_key
    key = agreed_key(liar._cipher_key, receiver, "owner0", binding)
    _take_spoilt(crowd, sealed, seal_envelope(key, content, binding))


def test_a_member_that_seals_nonsense_for_one_neighbour_spoils_nothing() -> None:
    crowd = Crowd(attempt_of(names(7)))
    asked, sent = crowd.send_keys(), updates(names(7))
    for name in asked:
        shared = crowd.members[name].share_secrets(crowd.server.peer_keys(name))
        if name == "owner2":
            shared = replace(shared, sealed={**shared.sealed, "owner0": bytes(105)})
        crowd.server.add_secrets(name, shared)
    crowd.server.close_secrets()
    crowd.unmask(crowd.send_updates(asked, sent))
    mean_N, _ = dequantise(crowd.server.total(), crowd.attempt.policy, 7)
    assert float((mean_N - plain_mean(sent)).abs().max()) <= 1e-6


def test_shares_of_an_earlier_attempt_are_refused(crowd: Crowd) -> None:
    old = received(crowd)
    second = Crowd(attempt_of(names(4), number=2))
    second.send_keys()
    second.send_secrets(names(4))
    with pytest.raises(QuorumNotMet, match=r"those of owner1, owner2, owner3 are not for it"):
        second.members["owner0"].take_secrets(old)


def test_shares_from_strangers_or_too_few_are_refused(crowd: Crowd) -> None:
    sealed = dict(received(crowd).sealed)
    with pytest.raises(ProtocolError, match="owner9, who sent no keys"):
        crowd.members["owner0"].take_secrets(PeerSecrets(sealed={**sealed, "owner9": b""}))
    del sealed["owner1"], sealed["owner2"]
    with pytest.raises(QuorumNotMet, match="2 of owner0 and its 3 neighbours shared secrets"):
        crowd.members["owner0"].take_secrets(PeerSecrets(sealed=sealed))


def test_a_neighbour_is_never_survivor_and_dropped(masked: Crowd) -> None:
    honest = masked.server.taken("owner0")
    lie = replace(honest, dropped=[*honest.dropped, honest.survivors[0]])
    with pytest.raises(ProtocolError, match=r"owner1 as survivor and as dropped.*both secrets"):
        masked.members["owner0"].unmask(lie)
    masked.members["owner0"].unmask(honest)


def test_only_one_list_of_survivors_is_answered(masked: Crowd) -> None:
    honest = masked.server.taken("owner0")
    member = masked.members["owner0"]
    first = member.unmask(honest)
    assert member.unmask(masked.server.taken("owner0")) is first
    swapped = replace(honest, survivors=[*honest.survivors[:1], "owner3"], dropped=["owner2"])
    with pytest.raises(ProtocolError, match=r"UPDATE_TAKEN came twice.*answers the first only"):
        member.unmask(swapped)


@pytest.mark.parametrize(
    ("survivors", "dropped", "text"),
    [
        (["owner1"], ["owner3"], "do not fit this member's mask partners .owner2"),
        (["owner1", "owner2", "owner9"], ["owner3"], "owner9"),
        (["owner1", "owner2", "owner0"], ["owner3"], "owner0"),
        (["owner1", "owner2"], [], "owner3"),
    ],
)
def test_lists_that_are_not_the_mask_partners_are_refused(
    masked: Crowd, survivors: list[str], dropped: list[str], text: str
) -> None:
    lie = UpdateTaken(survivors=survivors, dropped=dropped, is_secure=True)
    with pytest.raises(ProtocolError, match=text):
        masked.members["owner0"].unmask(lie)


def test_survivors_below_the_threshold_are_refused(masked: Crowd) -> None:
    lie = UpdateTaken(survivors=["owner1"], dropped=["owner2", "owner3"], is_secure=True)
    with pytest.raises(QuorumNotMet, match=r"2 of owner0 and its 3 neighbours sent updates; 3 are"):
        masked.members["owner0"].unmask(lie)


def test_an_update_that_was_masked_is_not_taken_as_plain(masked: Crowd) -> None:
    lie = replace(masked.server.taken("owner0"), is_secure=False)
    with pytest.raises(ProtocolError, match="not secure"):
        masked.members["owner0"].unmask(lie)


def test_one_mask_hides_one_update(masked: Crowd) -> None:
    values_N, weight = updates(names(4))["owner0"]
    member = masked.members["owner0"]
    first = member.mask(values_N, weight)
    assert torch.equal(member.mask(values_N, weight), first)
    for other in ((values_N + 1, weight), (values_N, weight + 1)):
        with pytest.raises(ProtocolError, match="an update came twice"):
            member.mask(*other)


def test_steps_have_one_order() -> None:
    crowd = Crowd(attempt_of(names(3)))
    member = crowd.members["owner0"]
    with pytest.raises(ProtocolError, match="PEER_SECRETS came before PEER_KEYS"):
        member.take_secrets(PeerSecrets(sealed={}))
    with pytest.raises(ProtocolError, match="update came before PEER_SECRETS"):
        member.mask(_VALUES, 1)
    with pytest.raises(ProtocolError, match="UPDATE_TAKEN came before the update"):
        member.unmask(UpdateTaken(survivors=["owner1", "owner2"], dropped=[], is_secure=True))


def test_repeated_answers_are_the_same_and_changed_ones_refused(crowd: Crowd) -> None:
    member, keys = crowd.members["owner0"], crowd.server.peer_keys("owner0")
    assert member.share_keys() is member.share_keys()
    assert member.share_secrets(keys) is member.share_secrets(crowd.server.peer_keys("owner0"))
    with pytest.raises(ProtocolError, match="PEER_KEYS came twice"):
        member.share_secrets(replace(keys, peers=keys.peers[:2]))
    secrets = received(crowd)
    member.take_secrets(secrets)
    member.take_secrets(crowd.server.peer_secrets("owner0"))
    with pytest.raises(ProtocolError, match="PEER_SECRETS came twice"):
        member.take_secrets(PeerSecrets(sealed={}))


def test_a_refused_answer_leaves_the_member_where_it_was(crowd: Crowd) -> None:
    member, keys = crowd.members["owner0"], crowd.server.peer_keys("owner0")
    with pytest.raises(QuorumNotMet):
        member.share_secrets(replace(keys, peers=[]))
    secrets = received(crowd)
    with pytest.raises(QuorumNotMet):
        member.take_secrets(PeerSecrets(sealed={}))
    member.take_secrets(secrets)
    with pytest.raises(DataError, match="NaN"):
        member.mask(torch.tensor([0, 0, float("nan"), 0, 0]), 1)
    assert member.mask(_VALUES, 1).shape == (6,)


def test_an_update_of_another_size_is_refused(masked: Crowd) -> None:
    with pytest.raises(ConfigError, match="an update of 4 values; the federation's has 5"):
        masked.members["owner0"].mask(torch.zeros(4), 1)


def test_clipped_values_are_counted(crowd: Crowd) -> None:
    member = crowd.members["owner0"]
    received(crowd)
    member.take_secrets(crowd.server.peer_secrets("owner0"))
    member.mask(torch.tensor([17.0, 0, -99.0, 1, 2]), 1)
    assert member.num_clipped == 2


def test_a_cohort_without_the_member_or_too_small_is_refused() -> None:
    with pytest.raises(ProtocolError, match="'owner9' is not in the cohort"):
        SecureMember("owner9", attempt_of(names(3)), 5)
    with pytest.raises(QuorumNotMet, match="the cohort has 2"):
        SecureMember("owner0", attempt_of(names(2)), 5)
    with pytest.raises(ConfigError, match="could reach"):
        SecureMember("owner0", attempt_of(names(2100)), 5)
