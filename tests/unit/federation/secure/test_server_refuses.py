"""What the server refuses, and how it opens a sum although members send wrong shares."""

import pytest
import torch
from msgspec.structs import replace

from cutlayer.errors import ConfigError, ProtocolError, QuorumNotMet, StepExpired
from cutlayer.federation.secure.ring import dequantise
from cutlayer.federation.secure.server import SecureRound, Step
from cutlayer.wire.federation_messages import Unmask
from tests.unit.federation.secure.crowd import Crowd, attempt_of, names, plain_mean, updates

_COHORT = names(7)
_SENT = updates(_COHORT)
_LOST = ["owner6"]


@pytest.fixture
def fresh() -> Crowd:
    return Crowd(attempt_of(_COHORT))


@pytest.fixture
def masked(fresh: Crowd) -> Crowd:
    """Seven, of whom one lost its update."""
    fresh.send_updates(fresh.send_secrets(fresh.send_keys()), _SENT, _LOST)
    return fresh


def answer(crowd: Crowd, name: str) -> Unmask:
    return crowd.members[name].unmask(crowd.server.taken(name))


def check_opened(crowd: Crowd) -> None:
    mean_N, _ = dequantise(crowd.server.total(), crowd.attempt.policy, 6)
    expected_N = plain_mean({name: _SENT[name] for name in _COHORT[:6]})
    assert float((mean_N - expected_N).abs().max()) <= 1e-6


def flipped(data: bytes, at: int) -> bytes:
    changed = bytearray(data)
    changed[at] ^= 1
    return bytes(changed)


def test_each_step_waits_for_those_of_the_step_before(fresh: Crowd) -> None:
    server = fresh.server
    assert (server.step, server.missing()) == (Step.KEYS, tuple(_COHORT))
    fresh.send_keys(["owner1"])
    assert (server.step, server.missing()) == (Step.SECRETS, ("owner0", *_COHORT[2:]))
    fresh.send_secrets([name for name in _COHORT if name not in ("owner1", "owner2")])
    assert (server.step, server.missing()) == (Step.UPDATES, ("owner0", *_COHORT[3:]))


def test_a_stranger_is_refused(fresh: Crowd) -> None:
    keys = fresh.members["owner0"].share_keys()
    with pytest.raises(ProtocolError, match="'owner9' is not in the cohort"):
        fresh.server.add_keys("owner9", keys)


@pytest.mark.parametrize("change", [{"round": 2}, {"attempt": 2}, {"federation": "other"}])
def test_a_replay_from_another_attempt_is_refused(fresh: Crowd, change: dict[str, object]) -> None:
    keys = replace(fresh.members["owner0"].share_keys(), **change)
    with pytest.raises(ProtocolError, match=r"owner0 sent a message of .* a replay"):
        fresh.server.add_keys("owner0", keys)


@pytest.mark.parametrize("name", ["cipher_key", "mask_key"])
def test_a_malformed_key_is_refused(fresh: Crowd, name: str) -> None:
    keys = replace(fresh.members["owner0"].share_keys(), **{name: bytes(31)})
    with pytest.raises(ProtocolError, match="not 32 bytes long"):
        fresh.server.add_keys("owner0", keys)


@pytest.mark.parametrize("name", ["cipher_key", "mask_key"])
def test_a_key_that_would_end_every_neighbours_part_is_refused_at_once(
    fresh: Crowd, name: str
) -> None:
    """32 zeros are the right length, and no secret can be agreed on with them."""
    keys = replace(fresh.members["owner0"].share_keys(), **{name: bytes(32)})
    with pytest.raises(ProtocolError, match="owner0 sent a public key that no secret"):
        fresh.server.add_keys("owner0", keys)


@pytest.mark.parametrize("name", ["certificate", "signature"])
def test_a_certificate_that_would_fill_neighbours_headers_is_refused(
    fresh: Crowd, name: str
) -> None:
    keys = replace(fresh.members["owner0"].share_keys(), **{name: bytes(1 << 16)})
    with pytest.raises(ProtocolError, match="over 8192 bytes"):
        fresh.server.add_keys("owner0", keys)


def test_envelopes_that_would_fill_a_neighbours_header_are_refused(fresh: Crowd) -> None:
    fresh.send_keys()
    shared = fresh.members["owner0"].share_secrets(fresh.server.peer_keys("owner0"))
    assert max(len(sealed) for sealed in shared.sealed.values()) == 105
    huge = replace(shared, sealed={**shared.sealed, "owner1": bytes(1 << 16)})
    with pytest.raises(ProtocolError, match="over 256 bytes"):
        fresh.server.add_secrets("owner0", huge)
    fresh.server.add_secrets("owner0", shared)


def test_the_same_again_changes_nothing_and_other_content_is_refused(masked: Crowd) -> None:
    server, member = masked.server, masked.members["owner0"]
    server.add_keys("owner0", member.share_keys())
    server.add_secrets("owner0", member.share_secrets(server.peer_keys("owner0")))
    server.add_masked("owner0", member.mask(*_SENT["owner0"]))
    masked.unmask(_COHORT[:6])
    masked.unmask(_COHORT[:1])
    check_opened(masked)
    other = Crowd(masked.attempt).members["owner0"].share_keys()
    with pytest.raises(ProtocolError, match="owner0 sent other content in step KEYS"):
        server.add_keys("owner0", other)
    with pytest.raises(ProtocolError, match="owner0 sent other content in step UPDATES"):
        server.add_masked("owner0", torch.zeros(6, dtype=torch.int64))


def test_who_is_late_is_told_to_wait(masked: Crowd) -> None:
    vector_M = masked.members["owner6"].mask(*_SENT["owner6"])
    with pytest.raises(StepExpired, match="owner6 is late: UPDATES"):
        masked.server.add_masked("owner6", vector_M)
    with pytest.raises(StepExpired, match="owner6 missed UPDATES of attempt 1 of round 1"):
        masked.server.taken("owner6")


def test_who_missed_a_step_is_out_of_the_attempt(fresh: Crowd) -> None:
    fresh.send_keys(["owner5"])
    with pytest.raises(StepExpired, match="owner5 is late: KEYS"):
        fresh.server.add_keys("owner5", fresh.members["owner5"].share_keys())
    with pytest.raises(StepExpired, match="owner5 missed KEYS"):
        fresh.server.peer_keys("owner5")


def test_who_is_ahead_is_refused(fresh: Crowd) -> None:
    server, vector_M = fresh.server, torch.zeros(6, dtype=torch.int64)
    server.add_keys("owner0", fresh.members["owner0"].share_keys())
    with pytest.raises(ProtocolError, match="owner0 is ahead: KEYS"):
        server.peer_keys("owner0")
    with pytest.raises(ProtocolError, match="owner0 is ahead: SECRETS"):
        server.add_masked("owner0", vector_M)
    with pytest.raises(ProtocolError, match="owner0 is ahead: UPDATES"):
        server.taken("owner0")


def test_steps_close_in_order(fresh: Crowd) -> None:
    with pytest.raises(ProtocolError, match="UPDATES cannot be closed in step KEYS"):
        fresh.server.close_updates()
    with pytest.raises(ProtocolError, match="masked until updates are closed"):
        fresh.server.total()
    assert not fresh.server.is_openable()


def test_a_share_for_each_neighbour_is_wanted(fresh: Crowd) -> None:
    fresh.send_keys()
    shared = fresh.members["owner0"].share_secrets(fresh.server.peer_keys("owner0"))
    fewer = {name: sealed for name, sealed in shared.sealed.items() if name != "owner3"}
    for sealed in (fewer, {**shared.sealed, "owner9": b""}, {**shared.sealed, "owner0": b""}):
        with pytest.raises(ProtocolError, match="one share for each of its neighbours"):
            fresh.server.add_secrets("owner0", replace(shared, sealed=sealed))


@pytest.mark.parametrize(
    "vector_M", [torch.zeros(5, dtype=torch.int64), torch.zeros(6), torch.zeros(6, 1).long()]
)
def test_a_masked_update_of_another_form_is_refused(fresh: Crowd, vector_M: torch.Tensor) -> None:
    fresh.send_secrets(fresh.send_keys())
    with pytest.raises(ProtocolError, match=r"\[6\] ring elements are wanted"):
        fresh.server.add_masked("owner0", vector_M)


def test_shares_that_were_not_asked_for_are_refused(masked: Crowd) -> None:
    honest = answer(masked, "owner0")
    seeds, keys = dict(honest.seed_shares), dict(honest.key_shares)
    for lie in (
        replace(honest, key_shares={}),
        replace(honest, key_shares={**keys, "owner1": b""}),
        replace(honest, seed_shares={**seeds, "owner6": b""}),
        replace(honest, seed_shares={name: seeds[name] for name in list(seeds)[1:]}),
    ):
        with pytest.raises(ProtocolError, match="one share per neighbour, as it was asked"):
            masked.server.add_unmask("owner0", lie)


@pytest.mark.parametrize("at", [0, 20, -1])
@pytest.mark.parametrize("liar", ["owner0", "owner5"])
def test_one_liar_is_survived_while_there_are_spare_shares(
    masked: Crowd, liar: str, at: int
) -> None:
    """Wrong unlock shares (first byte), and envelopes that do not open (the others)."""
    honest = answer(masked, liar)
    lie = replace(
        honest,
        seed_shares={name: flipped(data, at) for name, data in honest.seed_shares.items()},
        key_shares={name: flipped(data, at) for name, data in honest.key_shares.items()},
    )
    masked.server.add_unmask(liar, lie)
    masked.unmask([name for name in _COHORT[:6] if name != liar])
    check_opened(masked)


def test_wrong_shares_inside_good_envelopes_are_survived_too(masked: Crowd) -> None:
    """A member that gives others' shares a wrong value is found by digest and public key."""
    lie = masked.members["owner2"]._bundles
    for name, bundle in lie.items():
        wrong = {what: flipped(getattr(bundle, what), 3) for what in ("seed", "key", "seed_digest")}
        lie[name] = replace(bundle, **wrong)
    masked.unmask(_COHORT[:6])
    check_opened(masked)


def test_three_liars_of_twenty_are_survived() -> None:
    cohort = names(20)
    crowd, sent = Crowd(attempt_of(cohort)), updates(cohort)
    crowd.send_updates(crowd.send_secrets(crowd.send_keys()), sent)
    for liar in ("owner0", "owner1", "owner9"):
        bundles = crowd.members[liar]._bundles
        bundles["owner4"] = replace(bundles["owner4"], seed=bytes(16))
    crowd.unmask(cohort)
    mean_N, _ = dequantise(crowd.server.total(), crowd.attempt.policy, 20)
    assert float((mean_N - plain_mean(sent)).abs().max()) <= 1e-6


def test_without_spare_shares_the_error_names_who_may_have_lied(masked: Crowd) -> None:
    lie = masked.members["owner2"]._bundles
    for name, bundle in lie.items():
        lie[name] = replace(bundle, seed=flipped(bundle.seed, 3))
    masked.unmask(_COHORT[:5])
    with pytest.raises(ProtocolError, match="seed of owner0 do not fit together: owner0 or one of"):
        masked.server.total()
    masked.unmask(_COHORT[5:6])
    check_opened(masked)


def test_a_member_that_shared_nonsense_is_named(fresh: Crowd) -> None:
    """Its seed cannot be opened, so there is no sum without an attempt without it."""
    cohort = fresh.send_secrets(fresh.send_keys())
    for name in cohort:
        fresh.members[name].take_secrets(fresh.server.peer_secrets(name))
        bundles = fresh.members[name]._bundles
        bundles["owner3"] = replace(
            bundles["owner3"], seed=bytes([len(name)] * 15 + [ord(name[-1])])
        )
        fresh.server.add_masked(name, fresh.members[name].mask(*_SENT[name]))
    fresh.server.close_updates()
    fresh.unmask(cohort)
    with pytest.raises(ProtocolError, match="shares of the seed of owner3 do not fit together"):
        fresh.server.total()


def test_answers_that_cannot_be_opened_are_named_when_they_are_missed(masked: Crowd) -> None:
    honest = answer(masked, "owner0")
    lie = {name: flipped(data, -1) for name, data in honest.seed_shares.items()}
    masked.server.add_unmask("owner0", replace(honest, seed_shares=lie))
    masked.unmask(_COHORT[1:5])
    with pytest.raises(
        ProtocolError, match=r"^4 readable shares.* 5 open it; the answers of owner0"
    ):
        masked.server.total()
    masked.unmask(_COHORT[5:6])
    check_opened(masked)


def test_too_few_answers_say_how_many_there_are(masked: Crowd) -> None:
    masked.unmask(_COHORT[:4])
    assert not masked.server.is_openable()
    with pytest.raises(QuorumNotMet, match=r"4 of 7 members revealed shares.* need 5 of their 7"):
        masked.server.total()
    masked.unmask(_COHORT[4:5])
    check_opened(masked)


def test_settings_that_could_wrap_are_refused_before_anybody_is_asked() -> None:
    with pytest.raises(ConfigError, match="could reach"):
        SecureRound(attempt_of(names(2100)), 5)
