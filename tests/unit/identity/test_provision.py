"""From request to installed kit, and everything that must be refused on the way."""

import base64
import os
import stat
from collections.abc import Callable
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.hashes import SHA256

from cutlayer.errors import ConfigError, PermissionRefused, StorageError
from cutlayer.identity.authority import approve, init_authority, open_authority, revoke
from cutlayer.identity.certificates import MemberKind, identify, load_certificates
from cutlayer.identity.check import check_kit
from cutlayer.identity.install import install, member_files
from cutlayer.identity.keys import certificate_fingerprint, new_key, save_key
from cutlayer.identity.kit import show_kit
from cutlayer.identity.provision import local
from cutlayer.identity.request import renew, request, show_request
from cutlayer.identity.revocation import Reason
from cutlayer.storage.files import read_private
from tests.unit.identity.conftest import Federation


def _roles(folder: Path) -> frozenset[str]:
    return identify((folder / "certificate.pem").read_bytes()).roles


def test_installed_kit_has_the_granted_name_roles_and_serial(federation: Federation) -> None:
    folder = federation.join("mercy")
    holder = identify((folder / "certificate.pem").read_bytes())
    note = show_kit(folder)
    assert (holder.name, holder.roles) == ("mercy", {"train", "generate"})
    assert note.serial == f"{holder.serial:x}"
    assert note.authority_fingerprint == federation.authority.fingerprint
    assert check_kit(folder) == []


def test_private_key_stays_in_its_folder_and_is_in_nothing_that_travels(
    federation: Federation,
) -> None:
    folder = federation.join("mercy")
    secret = read_private(folder / "key.pem").split(b"\n")[1]
    for path in [*federation.authority.folder.rglob("*"), folder / "request.csr"]:
        if path.is_file():
            assert secret not in path.read_bytes()
    assert stat.S_IMODE((folder / "key.pem").stat().st_mode) == 0o600
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700


def test_request_asked_twice_keeps_its_key_and_fingerprint(tmp_path: Path) -> None:
    first = request(tmp_path / "a", "mercy")
    second = request(tmp_path / "a", "mercy-north")
    assert (first.fingerprint, second.name) == (second.fingerprint, "mercy-north")
    assert show_request(second.path) == second


def test_server_request_carries_its_hosts(tmp_path: Path) -> None:
    asked = request(tmp_path / "s", "trunk", MemberKind.SERVER, ["trunk.example.org", "::1"])
    assert asked.hosts == ("trunk.example.org", "::1")
    assert asked.kind is MemberKind.SERVER


def test_wrong_fingerprint_approves_nothing(federation: Federation) -> None:
    asked = request(federation.folder / "a", "mercy")
    other = request(federation.folder / "b", "mercy")
    with pytest.raises(PermissionRefused, match="not that of"):
        approve(federation.authority, other.path, ["train"], fingerprint=asked.fingerprint)
    assert not (federation.authority.folder / "kits").exists()


@pytest.mark.parametrize("roles", [[], ["serve"], ["train", "root"], "train"])
def test_roles_that_do_not_fit_are_refused(federation: Federation, roles: list[str]) -> None:
    asked = request(federation.folder / "a", "mercy")
    with pytest.raises(ConfigError, match="choose from administer, generate, train"):
        approve(federation.authority, asked.path, roles, fingerprint=asked.fingerprint)


@pytest.mark.parametrize("days", [0, -1, 826])
def test_validity_out_of_range_is_refused(federation: Federation, days: int) -> None:
    asked = request(federation.folder / "a", "mercy")
    with pytest.raises(ConfigError, match="days"):
        approve(federation.authority, asked.path, ["train"], days, fingerprint=asked.fingerprint)


def test_certificate_never_outlives_its_authority(federation: Federation) -> None:
    asked = request(federation.folder / "a", "mercy")
    federation.clock.offset = federation.authority.certificate.not_valid_after_utc - (
        federation.clock()
    )
    with pytest.raises(ConfigError, match="authority's own end"):
        approve(federation.authority, asked.path, ["train"], 1, fingerprint=asked.fingerprint)


def test_name_of_another_member_is_not_given_away(federation: Federation) -> None:
    federation.join("mercy")
    thief = request(federation.folder / "thief", "mercy")
    with pytest.raises(PermissionRefused, match="another key"):
        approve(federation.authority, thief.path, ["train"], fingerprint=thief.fingerprint)
    with pytest.raises(PermissionRefused, match="another key"):
        approve(
            open_authority(federation.authority.folder),
            thief.path,
            ["train"],
            fingerprint=thief.fingerprint,
        )
    kit = approve(
        federation.authority,
        thief.path,
        ["train"],
        fingerprint=thief.fingerprint,
        name="mercy-south",
    )
    assert show_kit(kit).name == "mercy-south"


def test_one_key_has_one_name(federation: Federation) -> None:
    folder = federation.join("mercy")
    asked = renew(folder)
    with pytest.raises(PermissionRefused, match="belongs to mercy"):
        approve(
            federation.authority,
            asked.path,
            ["train"],
            fingerprint=asked.fingerprint,
            name="other",
        )


def test_first_kit_needs_the_authoritys_fingerprint(federation: Federation) -> None:
    folder = federation.folder / "a"
    asked = request(folder, "mercy")
    kit = approve(federation.authority, asked.path, ["train"], fingerprint=asked.fingerprint)
    with pytest.raises(ConfigError, match=federation.authority.fingerprint):
        install(kit, folder)
    with pytest.raises(PermissionRefused, match="do not use it"):
        install(kit, folder, asked.fingerprint)
    assert not (folder / "certificate.pem").exists()
    install(kit, folder, federation.authority.fingerprint.upper().replace(" ", ":"))
    install(kit, folder)


def test_kit_of_another_authority_is_refused(
    make_federation: Callable[[str], Federation], federation: Federation
) -> None:
    folder = federation.join("mercy")
    forger = make_federation("cardiology2").authority
    asked = renew(folder)
    kit = approve(forger, asked.path, ["administer"], fingerprint=asked.fingerprint)
    with pytest.raises(PermissionRefused, match="do not use it"):
        install(kit, folder)
    assert _roles(folder) == {"train", "generate"}


def test_kit_for_another_key_is_refused(federation: Federation) -> None:
    federation.join("mercy")
    kit = next((federation.authority.folder / "kits").iterdir())
    request(federation.folder / "b", "other")
    with pytest.raises(PermissionRefused, match="made for another key"):
        install(kit, federation.folder / "b", federation.authority.fingerprint)


def test_kit_needs_a_request_first(federation: Federation, tmp_path: Path) -> None:
    federation.join("mercy")
    kit = next((federation.authority.folder / "kits").iterdir())
    with pytest.raises(ConfigError, match="provision request"):
        install(kit, tmp_path / "nowhere", federation.authority.fingerprint)
    assert not (tmp_path / "nowhere").exists()


def test_renewal_keeps_the_key_and_changes_the_serial(federation: Federation) -> None:
    folder = federation.join("mercy")
    before = show_kit(folder)
    asked = renew(folder)
    kit = approve(federation.authority, asked.path, ["generate"], fingerprint=asked.fingerprint)
    install(kit, folder)
    after = show_kit(folder)
    assert after.key_fingerprint == before.key_fingerprint
    assert after.serial != before.serial
    assert _roles(folder) == {"generate"}


def test_renewal_with_a_new_key_switches_when_the_kit_is_installed(federation: Federation) -> None:
    folder = federation.join("mercy")
    (folder / "notes.txt").write_text("mine")
    before = show_kit(folder)
    asked = renew(folder, new=True)
    assert renew(folder, new=True).fingerprint == asked.fingerprint
    assert check_kit(folder) == []
    with pytest.raises(PermissionRefused, match="approve it as a replacement"):
        approve(federation.authority, asked.path, ["train"], fingerprint=asked.fingerprint)
    kit = approve(
        federation.authority, asked.path, ["train"], fingerprint=asked.fingerprint, replaces=True
    )
    install(kit, folder)
    assert show_kit(folder).key_fingerprint == asked.fingerprint != before.key_fingerprint
    assert check_kit(folder) == []
    assert not (folder / "key-next.pem").exists()
    assert (folder / "notes.txt").read_text() == "mine"
    assert revoke(federation.authority, int(before.serial, 16), Reason.SUPERSEDED)


def test_failed_installation_leaves_the_old_certificate_in_use(
    federation: Federation, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = federation.join("mercy")
    asked = renew(folder, new=True)
    kit = approve(
        federation.authority, asked.path, ["train"], fingerprint=asked.fingerprint, replaces=True
    )
    real, calls = os.fsync, []

    def fail_later(descriptor: int) -> None:
        calls.append(descriptor)
        if len(calls) > 5:
            raise OSError(28, "No space left on device")
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fail_later)
    with pytest.raises(StorageError, match="free space"):
        install(kit, folder)
    monkeypatch.undo()
    assert check_kit(folder) == []
    install(kit, folder)
    assert check_kit(folder) == []


def test_key_may_stay_where_it_is(federation: Federation, tmp_path: Path) -> None:
    key_file, folder = tmp_path / "hsm" / "key.pem", federation.folder / "a"
    key_file.parent.mkdir()
    save_key(key_file, rsa.generate_private_key(65537, 2048))
    asked = request(folder, "mercy", key_file=key_file)
    kit = approve(federation.authority, asked.path, ["train"], fingerprint=asked.fingerprint)
    install(kit, folder, federation.authority.fingerprint)
    assert member_files(folder).key == key_file
    assert not (folder / "key.pem").exists()
    assert check_kit(folder) == []
    with pytest.raises(ConfigError, match="make a new key there"):
        renew(folder, new=True)


def test_folder_with_a_certificate_takes_no_new_request(federation: Federation) -> None:
    with pytest.raises(ConfigError, match="renew it"):
        request(federation.join("mercy"), "mercy")
    with pytest.raises(ConfigError, match="provision request"):
        renew(federation.folder)


def _body(pem: bytes) -> bytes:
    return b"".join(line for line in pem.split(b"\n") if not line.startswith(b"-"))


def test_changed_request_is_refused(tmp_path: Path) -> None:
    asked = request(tmp_path / "a", "mercy")
    pem = asked.path.read_bytes()
    renamed = base64.b64encode(base64.b64decode(_body(pem)).replace(b"mercy", b"other"))
    forged = b"-----BEGIN CERTIFICATE REQUEST-----\n" + renamed
    forged += b"\n-----END CERTIFICATE REQUEST-----\n"
    for bad in (b"", b"garbage", pem[:-60], forged):
        asked.path.write_bytes(bad)
        with pytest.raises(ConfigError, match=r"request\.csr"):
            show_request(asked.path)
    with pytest.raises(StorageError, match="check the path"):
        show_request(tmp_path / "missing.csr")


def test_authority_is_made_once_and_its_key_is_guarded(tmp_path: Path) -> None:
    folder = tmp_path / "authority"
    made = init_authority(folder, "cardiology", b"passphrase")
    with pytest.raises(ConfigError, match="already"):
        init_authority(folder, "cardiology")
    with pytest.raises(StorageError, match="is encrypted"):
        open_authority(folder)
    with pytest.raises(StorageError, match="passphrase is wrong"):
        open_authority(folder, b"wrong")
    assert open_authority(folder, b"passphrase").fingerprint == made.fingerprint
    (folder / "authority-key.pem").chmod(0o644)
    with pytest.raises(StorageError, match="chmod 600"):
        open_authority(folder, b"passphrase")
    with pytest.raises(ConfigError, match="provision init"):
        open_authority(tmp_path / "elsewhere")


def test_authority_with_another_key_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "authority"
    init_authority(folder, "cardiology")
    (folder / "authority-key.pem").unlink()
    save_key(folder / "authority-key.pem", new_key())
    with pytest.raises(StorageError, match="from one backup"):
        open_authority(folder)


def test_register_that_was_edited_stops_the_owner(federation: Federation) -> None:
    federation.join("mercy")
    path = federation.authority.folder / "issued.jsonl"
    path.write_bytes(path.read_bytes().replace(b'"train"', b'"extra"'))
    asked = request(federation.folder / "b", "other")
    with pytest.raises(StorageError, match="was changed"):
        approve(federation.authority, asked.path, ["train"], fingerprint=asked.fingerprint)


def test_compromised_key_is_never_certified_again(federation: Federation) -> None:
    folder = federation.join("mercy")
    revoke(federation.authority, "mercy", Reason.KEY_COMPROMISE)
    asked = renew(folder)
    with pytest.raises(PermissionRefused, match="needs a new key"):
        approve(federation.authority, asked.path, ["train"], fingerprint=asked.fingerprint)
    fresh = renew(folder, new=True)
    approve(federation.authority, fresh.path, ["train"], fingerprint=fresh.fingerprint)


def test_local_sets_up_everything_and_keeps_it_when_repeated(tmp_path: Path) -> None:
    first = local(tmp_path / "keys", ["alice"], server_address="localhost:50051")
    serials = [show_kit(p).serial for p in (first.server, first.clients["alice"])]
    assert _roles(first.clients["alice"]) == {"train", "generate", "administer"}
    assert _roles(first.server) == {"serve"}
    assert show_kit(first.clients["alice"]).server_address == "localhost:50051"
    again = local(tmp_path / "keys", ["alice", "bob"])
    assert [show_kit(p).serial for p in (again.server, again.clients["alice"])] == serials
    assert check_kit(again.clients["bob"]) == []
    moved = local(tmp_path / "keys", ["alice"], hosts=["trunk.example.org"])
    assert show_kit(moved.server).hosts == ("trunk.example.org",)


def test_local_renews_what_ends_soon_but_never_a_revoked_member(
    tmp_path: Path, federation: Federation
) -> None:
    clock = federation.clock
    made = local(tmp_path / "keys", ["alice"], now=clock)
    before = show_kit(made.clients["alice"]).serial
    clock.offset += load_certificates(made.server / "certificate.pem")[0].not_valid_after_utc - (
        clock()
    )
    local(tmp_path / "keys", ["alice"], now=clock)
    assert show_kit(made.clients["alice"]).serial != before
    assert check_kit(made.server, clock()) == []
    revoke(open_authority(made.authority, now=clock), "alice")
    with pytest.raises(StorageError, match="is revoked"):
        local(tmp_path / "keys", ["alice"], now=clock)


@pytest.mark.parametrize("name", ["server", "authority", "A"])
def test_local_refuses_client_names_that_clash(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match="name"):
        local(tmp_path / "keys", [name])


def test_local_refuses_an_open_folder(tmp_path: Path) -> None:
    (tmp_path / "keys").mkdir(mode=0o755)
    (tmp_path / "keys").chmod(0o755)
    with pytest.raises(StorageError, match="chmod 700"):
        local(tmp_path / "keys")


def test_authority_fingerprint_is_that_of_openssl(federation: Federation) -> None:
    certificate = load_certificates(federation.authority.folder / "authority.pem")[0]
    assert federation.authority.fingerprint.replace(" ", "") == (
        certificate.fingerprint(SHA256()).hex()
    )
    assert certificate_fingerprint(certificate) == federation.authority.fingerprint
