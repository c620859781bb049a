"""Revocation takes effect at once, and never goes back."""

import logging
import os
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest

from cutlayer.errors import ConfigError, PermissionRefused, StorageError
from cutlayer.identity.admission import Admission
from cutlayer.identity.authority import (
    approve,
    init_authority,
    open_authority,
    publish_list,
    revoke,
)
from cutlayer.identity.certificates import identify
from cutlayer.identity.install import install
from cutlayer.identity.request import renew
from cutlayer.identity.revocation import (
    Reason,
    RevocationList,
    install_revocations,
    read_list,
)
from cutlayer.storage.files import write_atomic
from tests.unit.identity.conftest import Federation


def _pem(folder: Path) -> bytes:
    return (folder / "certificate.pem").read_bytes()


def _serial(folder: Path) -> int:
    return identify(_pem(folder)).serial


def _open(server: Path, federation: Federation) -> RevocationList:
    return RevocationList(server / "revoked.pem", server / "authority.pem", now=federation.clock)


def test_revoked_certificate_is_seen_by_an_open_reader(federation: Federation) -> None:
    server, mercy, other = (
        federation.join("trunk", "server"),
        federation.join("mercy"),
        federation.join("other"),
    )
    reader = _open(server, federation)
    assert not reader.is_revoked(_serial(mercy))
    serials = revoke(federation.authority, "mercy", Reason.KEY_COMPROMISE)
    assert serials == (_serial(mercy),)
    assert not reader.is_revoked(_serial(mercy))
    install_revocations(federation.authority.folder / "revoked.pem", server)
    assert reader.is_revoked(_serial(mercy))
    assert not reader.is_revoked(_serial(other))
    assert reader.warnings() == []


def test_list_can_be_published_straight_to_a_server(federation: Federation) -> None:
    server, mercy = federation.join("trunk", "server"), federation.join("mercy")
    reader = _open(server, federation)
    revoke(federation.authority, _serial(mercy), publish=[server / "revoked.pem"])
    assert reader.is_revoked(_serial(mercy))


def test_revocations_add_up_over_restarts_of_the_owner(federation: Federation) -> None:
    folders = [federation.join(name) for name in ("a", "b")]
    for name in ("a", "b"):
        revoke(open_authority(federation.authority.folder), name)
    current = read_list(
        federation.authority.folder / "revoked.pem", federation.authority.folder / "authority.pem"
    )
    assert current.serials == {_serial(folder) for folder in folders}
    assert current.number == 3


def test_unknown_or_already_revoked_member_is_named(federation: Federation) -> None:
    federation.join("mercy")
    with pytest.raises(ConfigError, match="'nobody'; valid ones belong to: mercy"):
        revoke(federation.authority, "nobody")
    with pytest.raises(ConfigError, match="serial number 4d2"):
        revoke(federation.authority, 1234)
    revoke(federation.authority, "mercy")
    with pytest.raises(ConfigError, match="belong to: nobody"):
        revoke(federation.authority, "mercy")


def test_older_list_is_refused_now_and_after_a_restart(
    federation: Federation, caplog: pytest.LogCaptureFixture
) -> None:
    server, mercy = federation.join("trunk", "server"), federation.join("mercy")
    old = (server / "revoked.pem").read_bytes()
    revoke(federation.authority, "mercy", publish=[server / "revoked.pem"])
    reader = _open(server, federation)
    with caplog.at_level(logging.WARNING):
        write_atomic(server / "revoked.pem", old)
        assert reader.is_revoked(_serial(mercy))
    assert "list 2 was seen already" in caplog.text
    assert "stays in force" in reader.warnings()[0]
    with pytest.raises(StorageError, match="list 2 was seen already"):
        _open(server, federation)
    write_atomic(federation.folder / "old.pem", old)
    install_revocations(federation.authority.folder / "revoked.pem", server)
    with pytest.raises(StorageError, match="seen already"):
        install_revocations(federation.folder / "old.pem", server)
    assert reader.is_revoked(_serial(mercy))
    assert reader.warnings() == []


def _cut(data: bytes) -> bytes:
    return data[: len(data) // 2]


@pytest.mark.parametrize("damage", [_cut, lambda data: b"", lambda data: b"garbage"])
def test_damaged_list_leaves_the_last_good_one_in_force(
    federation: Federation, damage: Callable[[bytes], bytes]
) -> None:
    server, mercy = federation.join("trunk", "server"), federation.join("mercy")
    path = server / "revoked.pem"
    revoke(federation.authority, "mercy", publish=[path])
    reader, good = _open(server, federation), path.read_bytes()
    path.write_bytes(damage(good))
    assert reader.is_revoked(_serial(mercy))
    assert "get it again" in reader.warnings()[0]
    with pytest.raises(StorageError, match="get it again"):
        _open(server, federation)
    write_atomic(path, good)
    assert reader.is_revoked(_serial(mercy))
    assert reader.warnings() == []


def test_removed_list_leaves_the_last_good_one_in_force(federation: Federation) -> None:
    server, mercy = federation.join("trunk", "server"), federation.join("mercy")
    revoke(federation.authority, "mercy", publish=[server / "revoked.pem"])
    reader = _open(server, federation)
    (server / "revoked.pem").unlink()
    assert reader.is_revoked(_serial(mercy))
    assert "check the path" in reader.warnings()[0]


def test_list_of_another_authority_with_the_same_name_is_refused(
    federation: Federation,
) -> None:
    server = federation.join("trunk", "server")
    reader = _open(server, federation)
    # Same name, other key: the issuer's name alone must not be enough.
    init_authority(federation.folder / "forger", "cardiology")
    foreign = federation.folder / "forger" / "revoked.pem"
    with pytest.raises(StorageError, match="not signed by this federation"):
        install_revocations(foreign, server)
    write_atomic(server / "revoked.pem", foreign.read_bytes())
    assert not reader.is_revoked(1)
    assert "not signed" in reader.warnings()[0]


def test_overdue_list_stays_in_force_with_a_warning(federation: Federation) -> None:
    server, mercy = federation.join("trunk", "server"), federation.join("mercy")
    revoke(federation.authority, "mercy", publish=[server / "revoked.pem"])
    reader = _open(server, federation)
    federation.clock.offset += timedelta(days=31)
    assert reader.is_revoked(_serial(mercy))
    assert "due for renewal" in reader.warnings()[0]
    publish_list(federation.authority, [server / "revoked.pem"])
    assert reader.is_revoked(_serial(mercy))
    assert reader.warnings() == []


def test_kit_that_lay_around_does_not_bring_an_old_list_back(federation: Federation) -> None:
    server, mercy = federation.join("trunk", "server"), federation.join("mercy")
    asked = renew(server)
    kit = approve(federation.authority, asked.path, ["serve"], fingerprint=asked.fingerprint)
    revoke(federation.authority, "mercy", publish=[server / "revoked.pem"])
    install(kit, server)
    assert _open(server, federation).is_revoked(_serial(mercy))


def test_admission_ends_with_revocation_and_with_expiry(federation: Federation) -> None:
    server, mercy, other = (
        federation.join("trunk", "server"),
        federation.join("mercy"),
        federation.join("other", days=2),
    )
    admission = Admission(_open(server, federation), now=federation.clock)
    serials = [admission.identify(_pem(folder), "ipv4:x").serial for folder in (mercy, other)]
    assert [admission.is_allowed(serial) for serial in serials] == [True, True]
    revoke(federation.authority, "mercy", publish=[server / "revoked.pem"])
    assert [admission.is_allowed(serial) for serial in serials] == [False, True]
    federation.clock.offset += timedelta(days=3)
    assert [admission.is_allowed(serial) for serial in serials] == [False, False]
    for folder in (mercy, other):
        with pytest.raises(PermissionRefused, match="revoked or has expired"):
            admission.identify(_pem(folder))
    assert not admission.is_allowed(99)
    assert admission.is_allowed(None)
    assert Admission(None).identify(_pem(mercy)).name == "mercy"


def test_reader_works_where_it_cannot_remember(federation: Federation, tmp_path: Path) -> None:
    server = federation.join("trunk", "server")
    reader = RevocationList(
        server / "revoked.pem", server / "authority.pem", seen=tmp_path / "no" / "seen"
    )
    assert "after a restart" in reader.warnings()[0]
    os.utime(server / "revoked.pem")
    assert not reader.is_revoked(1)
