"""Every problem of a member's folder is found and said."""

from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest

from cutlayer.identity.authority import revoke
from cutlayer.identity.check import check_kit
from cutlayer.identity.keys import new_key, save_key
from cutlayer.identity.request import request
from cutlayer.identity.revocation import install_revocations
from cutlayer.storage.files import write_atomic
from tests.unit.identity.conftest import Federation


def _texts(folder: Path, federation: Federation, *, errors: bool = True) -> str:
    found = check_kit(folder, federation.clock())
    assert found
    assert all(finding.is_error is errors for finding in found), found
    return "\n".join(finding.text for finding in found)


def test_folder_in_order_has_no_findings(federation: Federation) -> None:
    assert check_kit(federation.join("mercy"), federation.clock()) == []
    assert check_kit(federation.join("trunk", "server"), federation.clock()) == []


@pytest.mark.parametrize("name", ["certificate.pem", "key.pem", "authority.pem", "revoked.pem"])
def test_missing_file_is_named(federation: Federation, name: str) -> None:
    folder = federation.join("mercy")
    (folder / name).unlink()
    assert f"{name} is missing" in _texts(folder, federation)


@pytest.mark.parametrize("name", ["certificate.pem", "key.pem", "authority.pem", "revoked.pem"])
def test_damaged_file_is_named(federation: Federation, name: str) -> None:
    folder = federation.join("mercy")
    write_atomic(folder / name, b"garbage")
    assert name in _texts(folder, federation)


def test_missing_folder_and_missing_request_are_said(federation: Federation) -> None:
    assert "does not exist" in _texts(federation.folder / "nobody", federation)
    (federation.folder / "empty").mkdir(mode=0o700)
    assert "provision request" in _texts(federation.folder / "empty", federation)


def test_request_without_kit_says_what_is_missing(federation: Federation) -> None:
    request(federation.folder / "a", "mercy")
    assert "certificate.pem is missing" in _texts(federation.folder / "a", federation)


def test_open_modes_are_errors(federation: Federation) -> None:
    folder = federation.join("mercy")
    (folder / "key.pem").chmod(0o644)
    folder.chmod(0o755)
    texts = _texts(folder, federation)
    assert "chmod 600" in texts
    assert "chmod 700" in texts


def test_end_is_warned_of_and_then_an_error(federation: Federation) -> None:
    folder = federation.join("mercy", days=40)
    federation.clock.offset = timedelta(days=12)
    assert "expires in 27 days" in _texts(folder, federation, errors=False)
    federation.clock.offset = timedelta(days=41)
    found = check_kit(folder, federation.clock())
    assert any(f.is_error and "has expired" in f.text for f in found)
    assert any(not f.is_error and "out of date" in f.text for f in found)


def test_clock_behind_the_certificate_is_an_error(federation: Federation) -> None:
    folder = federation.join("mercy")
    federation.clock.offset = -timedelta(days=1)
    assert "check this machine's clock" in _texts(folder, federation)


def test_key_of_somebody_else_is_an_error(federation: Federation) -> None:
    folder = federation.join("mercy")
    (folder / "key.pem").unlink()
    save_key(folder / "key.pem", new_key())
    assert "is not the key of" in _texts(folder, federation)


def test_other_authority_is_an_error(
    federation: Federation, make_federation: Callable[[str], Federation]
) -> None:
    folder = federation.join("mercy")
    other = make_federation("neurology").authority.folder / "authority.pem"
    write_atomic(folder / "authority.pem", other.read_bytes())
    assert "did not issue" in _texts(folder, federation)


def test_revoked_member_learns_it(federation: Federation) -> None:
    folder = federation.join("mercy")
    revoke(federation.authority, "mercy")
    install_revocations(federation.authority.folder / "revoked.pem", folder)
    assert "is revoked" in _texts(folder, federation)


def test_changed_note_is_an_error(federation: Federation) -> None:
    folder = federation.join("mercy")
    write_atomic(
        folder / "kit.json", (folder / "kit.json").read_bytes().replace(b'"train"', b'"serve"')
    )
    assert "kit.sig" in _texts(folder, federation)
