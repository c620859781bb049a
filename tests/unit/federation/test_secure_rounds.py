"""The coordinator over real secure aggregation: the same sums, with members lost at every step."""

import hashlib
from pathlib import Path

import msgspec
import pytest
import torch

from cutlayer.errors import PermissionRefused, ProtocolError, StepExpired
from cutlayer.federation.coordinator import Coordinator
from cutlayer.federation.secure.hidden import GroupKey, open_state, pad
from cutlayer.federation.secure.ring import dequantise
from cutlayer.federation.secure.server import SecureRound
from cutlayer.federation.state import flatten, unflatten
from cutlayer.model.adapters import initial_state
from cutlayer.wire.federation_messages import (
    SendUpdate,
    ShareKeys,
    ShareSecrets,
    Unmask,
)
from cutlayer.wire.header import Header
from cutlayer.wire.ring import bytes_of_words
from tests.unit.federation.rounds_world import ENDS, TRUNK, World, learnt, weight_of

NAMES = tuple("abcdef")
STEPS: list[type[Header]] = [ShareKeys, ShareSecrets, SendUpdate, Unmask]


def _world(folder: Path, **table: object) -> World:
    return World(folder, **{"secure": {"enabled": True, "threshold": 0.6}, "rounds": 1, **table})


def _equals_plain(world: World, survivors: list[tuple[str, ...]]) -> None:
    wanted = world.expected(survivors)
    for key, value in world.final().items():
        torch.testing.assert_close(value, wanted[key], rtol=1e-6, atol=1e-6)


def test_secure_rounds_equal_plain_ones(tmp_path: Path) -> None:
    world = _world(tmp_path, rounds=2)
    world.add(*NAMES)
    world.run_to(2)
    _equals_plain(world, [NAMES, NAMES])
    assert [row.total_weight for row in world.store.rounds()] == [sum(map(weight_of, NAMES))] * 2


@pytest.mark.parametrize("step", STEPS, ids=lambda step: step.__name__)
@pytest.mark.parametrize("is_told", [True, False], ids=["lost", "silent"])
def test_a_member_lost_at_any_step_costs_its_update_at_most(
    tmp_path: Path, step: type[Header], is_told: bool
) -> None:
    world = _world(tmp_path)
    world.add(*NAMES)
    gone = world.members["e"]
    gone.stops_before = lambda call: isinstance(call, step)
    world.advance()
    world.pump()
    if is_told:
        world.coordinator.lost("e", world.now_s)
    world.run_to(1)
    survivors = NAMES if step is Unmask else ("a", "b", "c", "d", "f")
    assert world.store.rounds()[0].survivors == list(survivors)
    assert world.store.rounds()[0].attempts == 1
    _equals_plain(world, [survivors])


@pytest.mark.parametrize("step", STEPS, ids=lambda step: step.__name__)
def test_a_member_restarted_at_any_step_is_in_the_next_attempt_or_round(
    tmp_path: Path, step: type[Header]
) -> None:
    """Its secrets are gone with the process, so it must not go on in this attempt."""
    world = _world(tmp_path, rounds=3)
    world.add("a", "b", "c", "d")
    member = world.members["b"]
    member.stops_before = lambda call: isinstance(call, step)
    world.advance()
    world.pump()
    world.coordinator.lost("b", world.now_s)
    member.stops_before = lambda call: False
    member.restart()
    world.run_to(3)
    last = world.store.rounds()[-1]
    assert last.survivors == list("abcd")
    assert not [error for error in member.errors if not isinstance(error, StepExpired)]
    _equals_plain(world, [tuple(row.survivors) for row in world.store.rounds()])


def test_below_the_threshold_the_attempt_is_refused_and_begun_again(tmp_path: Path) -> None:
    world = _world(tmp_path, secure={"enabled": True, "threshold": 0.9})
    world.add("a", "b", "c", "d")
    world.members["d"].stops_before = lambda call: isinstance(call, SendUpdate)
    world.advance()
    world.advance()
    attempts = world.store.attempts(1)
    assert "secure.threshold" in attempts[0].outcome
    world.members["d"].stops_before = lambda call: False
    world.run_to(1)
    (row,) = world.store.rounds()
    assert row.attempts == 2
    _equals_plain(world, [tuple(row.survivors)])


def test_the_secure_path_keeps_no_members_update(tmp_path: Path) -> None:
    """What the server holds of a member is uniform noise: no value of its update is in it."""
    world = _world(tmp_path)
    world.add(*NAMES)
    world.members["f"].stops_before = lambda call: isinstance(call, SendUpdate)
    world.advance()
    world.pump()
    masked = world.members["f"].tensors["masked"]
    values_N = flatten(learnt("f", 1, ENDS), ENDS)
    plain = (values_N.double() * 2.0**30).round().to(torch.int64) * weight_of("f")
    assert not torch.isin(masked, plain).any()
    assert float(masked.double().abs().mean()) > 2.0**60


@pytest.mark.parametrize("wrong", ["dtype", "name", "length", "plain"])
def test_a_malformed_masked_update_is_refused_and_the_others_go_on(
    tmp_path: Path, wrong: str
) -> None:
    world = _world(tmp_path)
    world.add(*NAMES)
    member = world.members["c"]
    member.stops_before = lambda call: isinstance(call, SendUpdate)
    world.advance()
    world.pump()
    masked = member.tensors["masked"]
    member.tensors = {
        "dtype": {"masked": masked.double()},
        "name": {"sum": masked},
        "length": {"masked": masked[:-1]},
        "plain": dict(learnt("c", 1, ENDS)),
    }[wrong]
    member.stops_before = lambda call: False
    member.poll()
    assert isinstance(member.errors[-1], ProtocolError)
    world.run_to(1)
    survivors = ("a", "b", "d", "e", "f")
    assert world.store.rounds()[0].survivors == list(survivors)
    _equals_plain(world, [survivors])


def test_a_lying_vector_is_refused_by_its_sum(tmp_path: Path) -> None:
    """Random ring elements cannot be told from masks; their sum can."""
    world = _world(tmp_path, max_attempts=2)
    world.add(*NAMES)
    member = world.members["c"]
    member.stops_before = lambda call: isinstance(call, SendUpdate)
    world.advance()
    world.pump()
    member.tensors = {"masked": member.tensors["masked"] + (1 << 61)}
    member.stops_before = lambda call: False
    world.pump()
    outcome = world.store.attempts(1)[0].outcome
    assert "a member sent a wrong vector" in outcome
    assert world.coordinator.status().round == 0 or world.store.rounds()[0].attempts == 2


def test_who_did_not_sign_its_keys_is_out_and_the_others_go_on(tmp_path: Path) -> None:
    """Neighbours would refuse unsigned keys, and so be out themselves: the server is first."""

    class OnlyLetters:
        """Stands for certificates of a to e; f has none."""

        def verify(self, member: str, certificate: bytes, data: bytes, signature: bytes) -> None:
            if (certificate, signature) != (member.encode(), hashlib.sha256(data).digest()):
                raise PermissionRefused(f"the signature is not {member}'s")

    world = _world(tmp_path, rounds=1)
    world.coordinator = Coordinator(
        world.settings, world.store, world.trunk, world.now_s, OnlyLetters()
    )
    world.add(*NAMES)
    for member in world.members.values():
        member.stops_before = lambda call: isinstance(call, ShareKeys)
    world.advance()
    world.pump()
    for name, member in world.members.items():
        member.stops_before = lambda call: False
        assert isinstance(member.call, ShareKeys)
        if name != "f":
            assert member.secure is not None
            data = member.secure._attempt.binding(
                "keys", name, member.call.cipher_key, member.call.mask_key
            )
            member.call = msgspec.structs.replace(
                member.call, certificate=name.encode(), signature=hashlib.sha256(data).digest()
            )
    world.pump()
    world.coordinator.tick(world.now_s)  # no time passes: nobody waits for f
    world.pump(1)
    assert world.store.rounds()[0].survivors == ["a", "b", "c", "d", "e"]
    assert isinstance(world.members["f"].errors[0], PermissionRefused)


def test_liars_do_not_make_the_server_try_to_open_the_sum_at_every_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Opening takes long in a large cohort: once when it seems possible, once at the end."""
    failed: list[str] = []
    opened = SecureRound.total

    def counted(secure: SecureRound) -> torch.Tensor:
        try:
            return opened(secure)
        except ProtocolError as error:
            failed.append(str(error))
            raise

    monkeypatch.setattr(SecureRound, "total", counted)
    world, names = _world(tmp_path, rounds=1), tuple("abcdefghi")
    world.add(*names)
    for member in world.members.values():
        member.stops_before = lambda call: isinstance(call, Unmask)
    world.advance()
    world.pump()
    for name in "abc":
        honest = world.members[name].call
        assert isinstance(honest, Unmask)
        lie = {owner: share[:-1] + b"?" for owner, share in honest.seed_shares.items()}
        world.members[name].call = msgspec.structs.replace(honest, seed_shares=lie)
    for member in world.members.values():
        member.stops_before = lambda call: False
    world.run_to(1)
    assert len(failed) == 1
    _equals_plain(world, [names])


def test_keys_out_of_turn_or_of_a_stranger_are_refused(tmp_path: Path) -> None:
    world = _world(tmp_path)
    world.add(*NAMES)
    for member in world.members.values():
        member.stops_before = lambda call: isinstance(call, ShareKeys)
    world.advance()
    world.pump()
    update = SendUpdate(federation="oncology", round=1, attempt=1, weight=0)
    with pytest.raises(ProtocolError, match="UPDATES while KEYS is open"):
        world.coordinator.submit("a", update, {}, world.now_s)
    keys = world.members["a"].call
    assert isinstance(keys, ShareKeys)
    short = msgspec.structs.replace(keys, mask_key=b"short")
    with pytest.raises(ProtocolError, match="not 32 bytes"):
        world.coordinator.submit("b", short, {}, world.now_s)
    for member in world.members.values():
        member.stops_before = lambda call: False
    world.run_to(1)
    assert world.store.rounds()[0].survivors == list("acdef")


def test_a_cohort_too_large_for_the_ring_is_cut(tmp_path: Path) -> None:
    policy = {"enabled": True, "value_bits": 39, "max_weight": 1 << 17}
    world = _world(tmp_path, secure=policy)
    world.add(*NAMES)
    world.run_to(1)
    # 2^(39 + 4 + 17) a member: seven fit below 2^63, and so do six.
    assert len(world.store.rounds()[0].cohort) == 6
    world = _world(tmp_path / "more", secure=policy | {"max_weight": 1 << 18})
    world.add(*NAMES)
    world.run_to(1)
    assert len(world.store.rounds()[0].cohort) == 3


def _hidden_world(folder: Path) -> tuple[World, GroupKey]:
    key = GroupKey(bytes(range(32)))
    secure = {"enabled": True, "threshold": 0.6, "hides_aggregate": True}
    return _world(folder, rounds=3, secure=secure), key


def test_a_hidden_aggregate_is_known_to_members_alone(tmp_path: Path) -> None:
    world, key = _hidden_world(tmp_path)
    world.add(*"abcd", group_key=key)
    world.members["d"].stops_before = lambda call: isinstance(call, SendUpdate)
    world.run_to(1)
    for member in world.members.values():
        member.stops_before = lambda call: isinstance(call, ShareKeys)
    world.pump()
    begun, tensors = world.members["a"].rounds[-1], world.members["a"].received
    assert set(tensors) == {"sum"}
    assert (begun.survivors, begun.total_weight) == (["a", "b", "c"], 0)
    # The server's files hold the trunk alone, and its sum is noise to it.
    assert world.final().keys() == TRUNK.keys()
    with pytest.raises(ProtocolError):
        dequantise(tensors["sum"], world.settings.secure, 3)
    total = tensors["sum"].clone()
    for name in begun.survivors:
        total -= pad(key, "oncology", 1, begun.sum_attempt, name, total.numel())
    mean_N, weight = dequantise(total, world.settings.secure, 3)
    wanted = world.expected(["abc"])
    found = unflatten(mean_N, ENDS)
    assert weight == sum(map(weight_of, "abc"))
    for name, value in found.items():
        start = initial_state(ENDS, 0)[name]
        torch.testing.assert_close(start + value.float(), wanted[name], rtol=1e-6, atol=1e-6)
    for name in TRUNK:
        torch.testing.assert_close(world.final()[name], wanted[name], rtol=1e-6, atol=1e-6)


def test_a_newcomer_gets_the_sealed_state_also_after_a_restart(tmp_path: Path) -> None:
    world, key = _hidden_world(tmp_path)
    world.add(*"abc", group_key=key)
    world.run_to(2)
    world.restart()
    late = world.add("z", group_key=key)[0]
    world.run_to(3)
    first = late.rounds[0]
    assert first.round == 3
    # The state that round 2 began with; `sum` is what round 2 added to it.
    opened = open_state(key, "oncology", 2, bytes_of_words(late.first_received["sealed"]))
    assert opened["round"].item() == 1.0
    known = [member.received for member in world.members.values() if member.name != "z"]
    assert all(set(received) == {"sum"} for received in known)


def test_a_hidden_update_without_the_sealed_state_is_refused(tmp_path: Path) -> None:
    world, key = _hidden_world(tmp_path)
    world.add(*"abcd", group_key=key)
    member = world.members["b"]
    member.stops_before = lambda call: isinstance(call, SendUpdate)
    world.advance()
    world.pump()
    assert isinstance(member.call, SendUpdate)
    del member.tensors["sealed"]
    member.stops_before = lambda call: False
    member.poll()
    assert "'masked', 'sealed'" in str(member.errors[-1])
