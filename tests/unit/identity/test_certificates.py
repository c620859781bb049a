"""A certificate names exactly one member."""

import contextlib
from datetime import UTC, datetime, timedelta

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding
from hypothesis import given
from hypothesis import strategies as st

from cutlayer.errors import ConfigError, PermissionRefused
from cutlayer.identity.certificates import (
    MemberKind,
    check_hosts,
    check_name,
    days_left,
    expiry_warning,
    identify,
    subject,
)
from cutlayer.identity.keys import new_key

_NOW = datetime(2026, 11, 21, tzinfo=UTC)


def _certificate(uris: list[str] | None, days: float = 10) -> x509.Certificate:
    key = new_key()
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject("x"))
        .issuer_name(subject("x"))
        .public_key(key.public_key())
        .serial_number(77)
        .not_valid_before(_NOW - timedelta(days=100))
        .not_valid_after(_NOW + timedelta(days=days))
    )
    if uris is not None:
        names = x509.SubjectAlternativeName([x509.UniformResourceIdentifier(u) for u in uris])
        builder = builder.add_extension(names, critical=False)
    return builder.sign(key, SHA256())


def test_name_roles_and_serial_are_read() -> None:
    uris = ["urn:cutlayer:name:mercy", "urn:cutlayer:role:train", "urn:cutlayer:role:future"]
    holder = identify(_certificate(uris).public_bytes(Encoding.PEM), "ipv4:10.0.0.1:5")
    assert (holder.name, holder.roles, holder.serial) == ("mercy", {"train"}, 77)
    assert holder.address == "ipv4:10.0.0.1:5"
    assert holder.not_after == _NOW + timedelta(days=10)


@pytest.mark.parametrize(
    "uris",
    [
        None,
        ["urn:cutlayer:role:train"],
        ["https://mercy.example"],
        ["urn:cutlayer:name:a", "urn:cutlayer:name:b"],
        ["urn:cutlayer:name:"],
        ["urn:cutlayer:name:../etc"],
        ["urn:cutlayer:name:A b"],
    ],
)
def test_certificate_without_one_proper_name_is_refused(uris: list[str] | None) -> None:
    with pytest.raises(PermissionRefused):
        identify(_certificate(uris).public_bytes(Encoding.PEM))


@given(st.binary(max_size=200), st.integers(0, 400))
def test_damaged_certificate_never_crashes_the_reader(noise: bytes, at: int) -> None:
    with pytest.raises(PermissionRefused):
        identify(noise)
    with contextlib.suppress(PermissionRefused):
        # Signatures are for TLS to verify; here no damage may end in another exception.
        identify(_PEM[:at] + noise + _PEM[at + 1 :])


_PEM = _certificate(["urn:cutlayer:name:a"]).public_bytes(Encoding.PEM)


@pytest.mark.parametrize("name", ["a", "mercy-hospital", "site.1_b", "0" * 63])
def test_plain_names_are_allowed(name: str) -> None:
    assert check_name(name) == name


@pytest.mark.parametrize(
    "name", ["", "A", "-a", "a-", "..", "a/b", "a b", "ä", "a" * 64, "a\n", "local", "plaintext"]
)
def test_names_unfit_for_files_and_logs_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="member name"):
        check_name(name)


def test_hosts_are_checked_by_kind() -> None:
    hosts = ("Trunk.example.org", "10.0.0.1", "::1", "trunk_1", "localhost")
    checked = check_hosts(MemberKind.SERVER, hosts)
    assert checked == ("trunk.example.org", "10.0.0.1", "::1", "trunk_1", "localhost")
    assert check_hosts(MemberKind.CLIENT, ()) == ()
    with pytest.raises(ConfigError, match="at least one host"):
        check_hosts(MemberKind.SERVER, ())
    with pytest.raises(ConfigError, match="takes no hosts"):
        check_hosts(MemberKind.CLIENT, ("a",))
    for bad in ("https://a", "a:50051", "a b", "", "10.0.0.300", "-a", "a" * 300):
        with pytest.raises(ConfigError, match="neither a DNS name"):
            check_hosts(MemberKind.SERVER, (bad,))


def test_warning_begins_thirty_days_before_the_end() -> None:
    assert expiry_warning(_certificate(["u:a"], days=30), "it", _NOW) is None
    soon, over = _certificate(["u:a"], days=29.5), _certificate(["u:a"], days=-1)
    assert "expires in 29 days (2026-12-20)" in str(expiry_warning(soon, "it", _NOW))
    assert "has expired (2026-11-20)" in str(expiry_warning(over, "it", _NOW))
    assert days_left(over, _NOW) == -1
