"""What a member refuses of its coordinator before anything is trained or sent."""

from pathlib import Path

import pytest

from cutlayer.client.membership import Adapters, Membership
from cutlayer.client.run_state import RunState
from cutlayer.client.settings import MembershipSettings, RunSettings
from cutlayer.errors import ConfigError, ProtocolError, StorageError
from cutlayer.federation.secure.hidden import GroupKey
from cutlayer.federation.settings import FederationSettings
from cutlayer.wire.federation_messages import Joined, Round

ADAPTERS = Adapters(layout={"layers.0.lora_A": [2, 4]}, update_keys=("layers.0.lora_A",))


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
