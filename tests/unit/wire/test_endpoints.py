"""Settings of both ends, and files of mutual TLS that are wrong."""

from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from cutlayer.errors import ConfigError
from cutlayer.settings import parse_settings
from cutlayer.wire.endpoints import (
    ConnectionSettings,
    ListenSettings,
    TlsFiles,
    check_security,
    is_loopback,
    read_tls,
)

FILES = TlsFiles(certificate=Path("a.crt"), key=Path("a.key"), authority=Path("ca.pem"))


@pytest.mark.parametrize("address", ["127.0.0.1:1", "localhost:0", "[::1]:80", "127.9.9.9:5"])
def test_plaintext_is_accepted_on_loopback(address: str) -> None:
    check_security(ListenSettings(address=address, plaintext=True))
    check_security(ConnectionSettings(address=address, plaintext=True))


@pytest.mark.parametrize(
    "address", ["0.0.0.0:1", "[::]:1", "10.0.0.1:1", "example.org:1", "localhost.evil.org:1"]
)
def test_plaintext_is_refused_elsewhere(address: str) -> None:
    assert not is_loopback(address)
    with pytest.raises(ConfigError, match="only loopback addresses"):
        check_security(ListenSettings(address=address, plaintext=True))
    with pytest.raises(ConfigError, match="only loopback addresses"):
        check_security(ConnectionSettings(address=address, plaintext=True))


def test_neither_tls_nor_plaintext_is_refused() -> None:
    with pytest.raises(ConfigError, match="no tls files for localhost:1; make them with"):
        check_security(ConnectionSettings(address="localhost:1"))


def test_both_tls_and_plaintext_are_refused() -> None:
    with pytest.raises(ConfigError, match="both set"):
        check_security(ListenSettings(address="localhost:1", plaintext=True, tls=FILES))


@pytest.mark.parametrize("address", ["localhost", ":80", "localhost:http", "localhost:70000", ""])
def test_an_address_without_a_port_is_refused(address: str) -> None:
    with pytest.raises(ConfigError, match="host:port"):
        parse_settings(ConnectionSettings, {"address": address}, "client.toml")


def test_an_unknown_codec_is_refused_with_the_known_ones() -> None:
    table = {"address": "localhost:1", "codec": "fp7"}
    with pytest.raises(ConfigError, match="known: bf16, fp8, int8, raw"):
        parse_settings(ConnectionSettings, table, "client.toml")


@pytest.mark.parametrize("missing", ["certificate", "key", "authority"])
def test_a_missing_tls_file_is_named(tmp_path: Path, missing: str) -> None:
    paths = {name: tmp_path / f"{name}.pem" for name in ("certificate", "key", "authority")}
    for name, path in paths.items():
        if name != missing:
            path.touch()
    with pytest.raises(ConfigError, match=f"{missing}.pem: No such file"):
        read_tls(TlsFiles(**paths))


def test_tls_files_that_are_no_pem_are_named(tmp_path: Path) -> None:
    path = tmp_path / "x.pem"
    path.write_text("hello")
    with pytest.raises(ConfigError, match=r"x\.pem are not a certificate"):
        read_tls(TlsFiles(certificate=path, key=path, authority=path))


def test_an_encrypted_key_is_an_error_and_asks_nobody_for_a_password(tmp_path: Path) -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    path = tmp_path / "key.pem"
    secret = serialization.BestAvailableEncryption(b"secret")
    kind = serialization.PrivateFormat.PKCS8
    path.write_bytes(key.private_bytes(serialization.Encoding.PEM, kind, secret))
    with pytest.raises(ConfigError, match="unencrypted private key"):
        read_tls(TlsFiles(certificate=path, key=path, authority=path))
