"""Private keys stay private; fingerprints are compared with care."""

import stat
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa

from cutlayer.errors import ConfigError, StorageError
from cutlayer.identity.keys import (
    check_key,
    is_same_fingerprint,
    key_fingerprint,
    load_key,
    new_key,
    save_key,
)


def test_saved_key_is_private_and_the_same_again(tmp_path: Path) -> None:
    key, path = new_key(), tmp_path / "key.pem"
    save_key(path, key)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert load_key(path).public_key() == key.public_key()
    with pytest.raises(StorageError, match="never overwritten"):
        save_key(path, key)


def test_key_open_to_others_is_refused(tmp_path: Path) -> None:
    save_key(tmp_path / "key.pem", new_key())
    (tmp_path / "key.pem").chmod(0o640)
    with pytest.raises(StorageError, match="chmod 600"):
        load_key(tmp_path / "key.pem")


def test_passphrase_is_needed_and_must_be_right(tmp_path: Path) -> None:
    path = tmp_path / "key.pem"
    save_key(path, new_key(), b"correct horse")
    load_key(path, b"correct horse")
    with pytest.raises(StorageError, match="is encrypted"):
        load_key(path)
    with pytest.raises(StorageError, match="passphrase is wrong"):
        load_key(path, b"battery staple")


def test_file_that_is_no_key_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "key.pem"
    path.write_bytes(b"-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n")
    path.chmod(0o600)
    with pytest.raises(StorageError, match="not a PEM key"):
        load_key(path)


def test_weak_or_unusual_keys_are_refused() -> None:
    bad = [
        ec.generate_private_key(ec.SECP256K1()),
        ed25519.Ed25519PrivateKey.generate(),
        rsa.generate_private_key(65537, 1024),
    ]
    for key in bad:
        with pytest.raises(ConfigError, match="another kind"):
            check_key(key.public_key(), "request")
    check_key(ec.generate_private_key(ec.SECP384R1()).public_key(), "request")


def test_fingerprints_compare_whatever_the_separators() -> None:
    fingerprint = key_fingerprint(new_key().public_key())
    assert len(fingerprint.replace(" ", "")) == 64
    assert is_same_fingerprint(fingerprint, fingerprint.replace(" ", ":").upper())
    assert not is_same_fingerprint(fingerprint, key_fingerprint(new_key().public_key()))
    assert not is_same_fingerprint(fingerprint, fingerprint[:-1])
    assert not is_same_fingerprint(fingerprint, "")
    assert not is_same_fingerprint(fingerprint, "ü")
