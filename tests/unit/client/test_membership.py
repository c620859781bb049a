"""What a member refuses of its coordinator before anything is trained or sent."""

from collections.abc import Mapping
from pathlib import Path

import msgspec
import pytest
import torch
from torch import Tensor

from cutlayer.client.federation_link import FederationLink
from cutlayer.client.membership import Membership
from cutlayer.client.round_share import Adapters
from cutlayer.client.run_state import RunState
from cutlayer.client.settings import MembershipSettings, RunSettings
from cutlayer.errors import ConfigError, ProtocolError, StorageError
from cutlayer.federation.chain import next_digest, payload_digest
from cutlayer.federation.secure.hidden import GroupKey, seal_state
from cutlayer.federation.settings import FederationSettings
from cutlayer.model.adapters import initial_state
from cutlayer.model.cut import Cut
from cutlayer.wire.federation_messages import EnterRound, Joined, Round
from cutlayer.wire.ring import words_of

ADAPTERS = Adapters(layout={"layers.0.lora_A": [2, 4]}, cut=Cut(1, 3))


def _joined(round_number: int = 0, **rules: object) -> Joined:
    table = {"name": "trial", "rounds": 9, **rules}
    policy = FederationSettings.model_validate(table).policy()
    return Joined(policy=policy.model_dump_json(), round=round_number, digest="", member="anna")


def _begun(round_number: int, attempt: int) -> Round:
    return Round(
        round=round_number,
        attempt=attempt,
        is_finished=False,
        cohort=["anna", "bert", "cleo"],
        digest="00",
        payload_digest="",
        survivors=[],
        total_weight=0,
    )


def _member(state: RunState, joined: Joined, key: GroupKey | None = None, **mine: object):
    settings = MembershipSettings(name="trial", **mine)
    return Membership(settings, joined, state, key, ADAPTERS)


@pytest.fixture
def state(tmp_path: Path):
    opened = RunState(RunSettings(folder=tmp_path / "run"))
    yield opened
    opened.close()


def test_weaker_secrets_than_the_owner_demands_are_refused(state: RunState) -> None:
    with pytest.raises(ConfigError, match=r"threshold=0\.55.*min_threshold=0\.6"):
        _member(state, _joined(secure={"threshold": 0.55}))
    with pytest.raises(ConfigError, match="neighbours=2"):
        _member(state, _joined(secure={"neighbours": 2}), min_cohort=6)


def test_a_hidden_aggregate_needs_the_group_key_and_a_rule_without_moments(
    state: RunState, tmp_path: Path
) -> None:
    hidden = {"hides_aggregate": True}
    with pytest.raises(ConfigError, match="group_key_file"):
        _member(state, _joined(secure=hidden))
    key = GroupKey.create(tmp_path / "key")
    with pytest.raises(ConfigError, match="fedadam"):
        _member(state, _joined(secure=hidden, strategy={"kind": "fedadam"}), key)


def test_no_second_update_leaves_under_one_pad_not_even_after_a_restart(tmp_path: Path) -> None:
    key, joined = GroupKey.create(tmp_path / "key"), _joined(secure={"hides_aggregate": True})
    first = RunState(RunSettings(folder=tmp_path / "run"))
    _member(first, joined, key).hand_in(_begun(2, 1))
    first.close()
    again = RunState(RunSettings(folder=tmp_path / "run"))
    member = _member(again, joined, key)
    assert member.num_handed_in == 1, "the next attempt would train on the same rows"
    with pytest.raises(ProtocolError, match="comes again"):
        member.hand_in(_begun(2, 1))
    member.hand_in(_begun(2, 2))
    again.close()


def test_a_coordinator_that_forgot_rounds_is_refused_unless_accepted(state: RunState) -> None:
    _member(state, _joined()).keep(_begun(4, 1))
    with pytest.raises(StorageError, match="older backup"):
        _member(state, _joined(round_number=1))
    _member(state, _joined(round_number=1), accept_rollback=True)
    _member(state, _joined(round_number=3))


def test_a_hidden_sum_is_never_rolled_back(state: RunState, tmp_path: Path) -> None:
    key, hidden = GroupKey.create(tmp_path / "key"), {"hides_aggregate": True}
    _member(state, _joined(secure=hidden), key).keep(_begun(4, 1))
    with pytest.raises(StorageError, match="must not be repeated"):
        _member(state, _joined(round_number=1, secure=hidden), key, accept_rollback=True)


class _Told(FederationLink):
    """A coordinator that says what the test wants it to say."""

    def __init__(self, begun: Round, tensors: Mapping[str, Tensor]) -> None:
        self.begun, self.tensors = begun, dict(tensors)

    def enter_round(self, call: EnterRound) -> tuple[Round, dict[str, Tensor]]:
        return self.begun, self.tensors


def _told(done: int, tensors: Mapping[str, Tensor], before: str = "", attempt: int = 1) -> _Told:
    """An honest round after `done`, whose chain ended with `before` one earlier."""
    payload = payload_digest({key: x for key, x in tensors.items() if key != "sealed"})
    digest = next_digest(before, "trial", done, payload)
    begun = _begun(done + 1, attempt)
    return _Told(
        msgspec.structs.replace(begun, digest=digest, payload_digest=payload), dict(tensors)
    )


FIRST = initial_state(ADAPTERS.layout, 0)
OTHER = {key: x + 1 for key, x in FIRST.items()}


def test_an_owner_with_a_group_key_joins_no_federation_that_shows_its_sums(
    state: RunState, tmp_path: Path
) -> None:
    """Else the operator could turn the hidden mode off between two starts."""
    key = GroupKey.create(tmp_path / "key")
    with pytest.raises(ConfigError, match=r"group_key_file.*hides_aggregate=true"):
        _member(state, _joined(), key)


def test_rules_of_another_federation_are_refused(state: RunState) -> None:
    """Pads under the name of another federation could have been used there."""
    with pytest.raises(ProtocolError, match="answered for federation other, this owner joins"):
        _member(state, _joined(name="other"))


def test_the_first_round_starts_from_what_the_seed_gives(state: RunState) -> None:
    member = _member(state, _joined())
    assert member.enter(_told(0, FIRST)).begun.round == 1
    with pytest.raises(ProtocolError, match="first round does not start from"):
        member.enter(_told(0, OTHER))
    with pytest.raises(ProtocolError, match="first round does not start from"):
        member.enter(_told(0, FIRST, before="00"))


def test_an_attempt_begun_again_starts_from_the_same_adapters(tmp_path: Path) -> None:
    """The chain's end alone is not enough: it says nothing of the tensors beside it."""
    settings = RunSettings(folder=tmp_path / "run")
    opened = RunState(settings)
    member, honest = _member(opened, _joined(round_number=4)), _told(4, FIRST, before="aa")
    member.keep(member.enter(honest).begun)
    opened.close()
    opened = RunState(settings)
    member = _member(opened, _joined(round_number=4))
    again = _told(4, FIRST, before="aa", attempt=2)
    assert member.enter(again).begun.attempt == 2
    forged = _told(4, OTHER, before="aa", attempt=3)
    forged.begun = msgspec.structs.replace(forged.begun, digest=honest.begun.digest)
    with pytest.raises(ProtocolError, match="does not follow"):
        member.enter(forged)
    opened.close()


def test_a_hidden_round_without_its_sum_is_refused(state: RunState, tmp_path: Path) -> None:
    """Else the server could send every member back to the first adapters."""
    key = GroupKey.create(tmp_path / "key")
    member = _member(state, _joined(secure={"hides_aggregate": True}), key)
    assert member.enter(_told(0, {})).adapters.keys() == FIRST.keys()
    for tensors in ({}, {"sum": torch.zeros(9)}, {"sum": torch.zeros(3, 3, dtype=torch.int64)}):
        with pytest.raises(ProtocolError, match="without the sum"):
            member.enter(_told(3, tensors, before="aa"))


@pytest.mark.parametrize("lie", [{}, {"x": torch.zeros(1)}, {next(iter(FIRST)): torch.zeros(9)}])
def test_a_newcomer_refuses_sealed_adapters_that_are_others(
    state: RunState, tmp_path: Path, lie: dict[str, Tensor]
) -> None:
    key = GroupKey.create(tmp_path / "key")
    member = _member(state, _joined(secure={"hides_aggregate": True}), key)
    tensors = {
        "sum": torch.zeros(9, dtype=torch.int64),
        "sealed": words_of(seal_state(key, "trial", 3, "aa", lie)),
    }
    with pytest.raises(ProtocolError, match="sealed adapters of round 3"):
        member.enter(_told(3, tensors, before="aa"))
