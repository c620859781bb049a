"""An export needs its owner's signed word, for this model, this receiver and this day."""

import json
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from cutlayer.errors import ConfigError, PermissionRefused, StorageError
from cutlayer.identity.keys import save_key
from cutlayer.tee.private_model.consent import (
    OwnerKey,
    check_consent,
    give_consent,
    new_owner_key,
    read_consent,
    require_consent,
)
from cutlayer.tee.private_model.label import What

MODEL = "ab" * 32
NOW = datetime(2026, 11, 21, 12, tzinfo=UTC)


@pytest.fixture
def owner(tmp_path: Path) -> Path:
    new_owner_key(tmp_path / "owner.pem")
    return tmp_path / "owner.pem"


def _public(owner: Path) -> OwnerKey:
    return OwnerKey(owner.with_suffix(".pub.pem"))


def _written(owner: Path, path: Path, to: str = "clinic", days: float = 1.0) -> Path:
    data = give_consent(owner, MODEL, What.ADAPTER, to, NOW + timedelta(days=days))
    path.write_bytes(data)
    return path


def test_a_signed_consent_covers_what_it_names(owner: Path, tmp_path: Path) -> None:
    path = _written(owner, tmp_path / "consent.json")
    consent = read_consent(path, _public(owner))
    check_consent(consent, MODEL, What.ADAPTER, "clinic", NOW)
    assert owner.stat().st_mode & 0o777 == 0o600


def test_an_ecdsa_key_will_do(tmp_path: Path) -> None:
    key = ec.generate_private_key(ec.SECP384R1())
    save_key(tmp_path / "owner.pem", key)
    pem = key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    (tmp_path / "owner.pub.pem").write_bytes(pem)
    path = _written(tmp_path / "owner.pem", tmp_path / "consent.json")
    assert read_consent(path, OwnerKey(tmp_path / "owner.pub.pem")).to == "clinic"


@pytest.mark.parametrize(
    ("model", "what", "to", "later", "reason"),
    [
        ("cd" * 32, What.ADAPTER, "clinic", 0, "model"),
        (MODEL, What.WEIGHTS, "clinic", 0, "what"),
        (MODEL, What.ADAPTER, "bank", 0, "to"),
        (MODEL, What.ADAPTER, "clinic", 2, "ended"),
    ],
)
def test_nothing_else_is_covered(
    owner: Path, tmp_path: Path, model: str, what: What, to: str, later: int, reason: str
) -> None:
    consent = read_consent(_written(owner, tmp_path / "consent.json"), _public(owner))
    with pytest.raises(PermissionRefused, match=reason):
        check_consent(consent, model, what, to, NOW + timedelta(days=later))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("to", "bank"),
        ("model", "cd" * 32),
        ("what", "weights"),
        ("until", "2036-01-01T00:00:00Z"),
        ("serial", "00" * 16),
    ],
)
def test_a_changed_consent_is_refused(owner: Path, tmp_path: Path, field: str, value: str) -> None:
    path = _written(owner, tmp_path / "consent.json")
    table = json.loads(path.read_bytes())
    table["consent"][field] = value
    path.write_text(json.dumps(table))
    with pytest.raises(PermissionRefused, match="not signed by the owner"):
        read_consent(path, _public(owner))


def test_another_owner_s_signature_is_refused(owner: Path, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    other = OwnerKey(new_owner_key(tmp_path / "other" / "owner.pem"))
    with pytest.raises(PermissionRefused, match="not signed by the owner"):
        read_consent(_written(owner, tmp_path / "consent.json"), other)


@pytest.mark.parametrize("bad", [b"", b"{}", b"\xff", b'{"consent": 1, "signature": ""}'])
def test_what_is_no_consent_is_refused(owner: Path, tmp_path: Path, bad: bytes) -> None:
    (tmp_path / "consent.json").write_bytes(bad)
    with pytest.raises(PermissionRefused, match="no consent"):
        read_consent(tmp_path / "consent.json", _public(owner))


def test_the_consent_is_found_among_others(owner: Path, tmp_path: Path) -> None:
    folder = tmp_path / "consents"
    folder.mkdir()
    arguments = (folder, _public(owner), MODEL, What.ADAPTER, "clinic", NOW)
    with pytest.raises(PermissionRefused, match="there is none"):
        require_consent(*arguments)
    (folder / "a.json").write_text("{}")
    _written(owner, folder / "b.json", to="bank")
    _written(owner, folder / "c.json", days=-1)
    with pytest.raises(PermissionRefused, match=r"b\.json: the consent's to is bank"):
        require_consent(*arguments)
    _written(owner, folder / "d.json")
    assert require_consent(*arguments).to == "clinic"


def test_keys_of_other_kinds_and_times_without_zone_are_refused(
    owner: Path, tmp_path: Path
) -> None:
    save_key(tmp_path / "rsa.pem", rsa.generate_private_key(public_exponent=65537, key_size=2048))
    until = NOW + timedelta(days=1)
    with pytest.raises(ConfigError, match="Ed25519"):
        give_consent(tmp_path / "rsa.pem", MODEL, What.ADAPTER, "clinic", until)
    with pytest.raises(ConfigError, match="time zone"):
        give_consent(owner, MODEL, What.ADAPTER, "clinic", until.replace(tzinfo=None))
    with pytest.raises(StorageError, match="never overwritten"):
        new_owner_key(owner)
    for bad in (owner, tmp_path / "none.pem"):
        with pytest.raises(ConfigError, match=r"public key|cannot read"):
            OwnerKey(bad)
    owner.chmod(0o644)
    with pytest.raises(StorageError, match="chmod 600"):
        give_consent(owner, MODEL, What.ADAPTER, "clinic", until)
