"""Where the sum is hidden from the server: pads that members remove, state that newcomers open."""

from pathlib import Path

import pytest
import torch

from cutlayer.errors import PermissionRefused, ProtocolError, StorageError
from cutlayer.federation.secure.hidden import GroupKey, open_state, pad, seal_state
from cutlayer.federation.secure.ring import dequantise
from tests.unit.cli.cli_world import run_command
from tests.unit.federation.secure.crowd import Crowd, attempt_of, names, plain_mean, updates

_STATE = {"0.q.A": torch.linspace(-1, 1, 6).reshape(2, 3), "0.q.B": torch.zeros(3, 2)}


@pytest.fixture
def key(tmp_path: Path) -> GroupKey:
    return GroupKey.create(tmp_path / "group.key")


def test_a_key_is_written_once_and_read_by_its_owner_alone(tmp_path: Path) -> None:
    path = tmp_path / "group.key"
    made = GroupKey.create(path)
    assert path.stat().st_mode & 0o777 == 0o600
    assert len(path.read_bytes()) == 32
    assert GroupKey.read(path).fingerprint == made.fingerprint
    with pytest.raises(StorageError, match="never overwritten"):
        GroupKey.create(path)
    path.chmod(0o640)
    with pytest.raises(StorageError, match="chmod 600"):
        GroupKey.read(path)


def test_another_file_is_no_key(tmp_path: Path) -> None:
    path = tmp_path / "group.key"
    path.write_bytes(bytes(31))
    path.chmod(0o600)
    with pytest.raises(StorageError, match="31 bytes, a group key has 32"):
        GroupKey.read(path)


def test_a_key_does_not_show_itself(key: GroupKey, tmp_path: Path) -> None:
    secret = (tmp_path / "group.key").read_bytes()
    for text in (repr(key), str(key), key.fingerprint.replace(" ", "")):
        assert secret.hex()[:16] not in text


def test_the_command_makes_a_key_and_says_its_fingerprint(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "new.key"
    made = run_command(capsys, "provision", "group-key", path, "--json")
    assert made.code == 0
    assert made.result == {"group_key": str(path), "fingerprint": GroupKey.read(path).fingerprint}
    assert run_command(capsys, "provision", "group-key", path).code == 6


def test_the_server_opens_noise_and_members_the_sum(key: GroupKey) -> None:
    cohort = names(5)
    crowd, sent = Crowd(attempt_of(cohort)), updates(cohort)
    asked = crowd.send_secrets(crowd.send_keys())
    for name in asked:
        crowd.members[name].take_secrets(crowd.server.peer_secrets(name))
    survivors = cohort[:4]
    for name in survivors:
        pad_M = pad(key, "oncology", 1, 1, name, 6)
        crowd.server.add_masked(name, crowd.members[name].mask(*sent[name], pad_M))
    crowd.server.close_updates()
    crowd.unmask(survivors)
    total_M = crowd.server.total()
    with pytest.raises(ProtocolError):
        dequantise(total_M, crowd.attempt.policy, 4)
    for name in survivors:
        total_M = total_M - pad(key, "oncology", 1, 1, name, 6)
    mean_N, _ = dequantise(total_M, crowd.attempt.policy, 4)
    expected_N = plain_mean({name: sent[name] for name in survivors})
    assert float((mean_N - expected_N).abs().max()) <= 1e-6


def test_a_wrong_list_of_survivors_is_noticed(key: GroupKey) -> None:
    total_M = torch.arange(6)
    for name in ("a", "b", "c"):
        total_M = total_M + pad(key, "f", 1, 1, name, 6)
    for name in ("a", "b"):
        total_M = total_M - pad(key, "f", 1, 1, name, 6)
    with pytest.raises(ProtocolError, match="a member sent a wrong vector"):
        dequantise(total_M, attempt_of(names(3)).policy, 3)


def test_every_pad_is_another_one(key: GroupKey, tmp_path: Path) -> None:
    places = [
        (key, "f", 1, 1, "a"),
        (key, "g", 1, 1, "a"),
        (key, "f", 2, 1, "a"),
        (key, "f", 1, 2, "a"),
        (key, "f", 1, 1, "b"),
        (GroupKey.create(tmp_path / "other.key"), "f", 1, 1, "a"),
    ]
    pads = [tuple(pad(*place, 4).tolist()) for place in places]
    assert len(set(pads)) == len(pads)
    assert torch.equal(pad(*places[0], 4), pad(*places[0], 4))
    assert torch.equal(pad(*places[0], 200_000)[:4], pad(*places[0], 4))


def test_newcomers_open_the_sealed_state(key: GroupKey) -> None:
    sealed = seal_state(key, "f", 3, "ab12", _STATE)
    for digest in (None, "ab12"):
        opened = open_state(key, "f", 3, sealed, digest)
        assert opened.keys() == _STATE.keys()
        assert all(torch.equal(opened[name], x) for name, x in _STATE.items())
    assert sealed != seal_state(key, "f", 3, "ab12", _STATE)


def test_sealed_state_of_another_place_is_refused(key: GroupKey, tmp_path: Path) -> None:
    sealed = seal_state(key, "f", 3, "ab12", _STATE)
    other = GroupKey.create(tmp_path / "other.key")
    for place in ((other, "f", 3), (key, "g", 3), (key, "f", 4)):
        with pytest.raises(PermissionRefused, match=r"do not open: .*group_key_file"):
            open_state(*place, sealed)
    with pytest.raises(PermissionRefused, match="another history"):
        open_state(key, "f", 3, sealed, "cd34")


@pytest.mark.parametrize("at", [0, 11, 12, 40, -1])
def test_changed_or_cut_state_is_refused(key: GroupKey, at: int) -> None:
    sealed = bytearray(seal_state(key, "f", 3, "ab12", _STATE))
    sealed[at] ^= 1
    for wrong in (bytes(sealed), bytes(sealed)[:at], b""):
        with pytest.raises(PermissionRefused, match="do not open"):
            open_state(key, "f", 3, wrong)
