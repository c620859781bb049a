"""Put a kit into a member's folder, once everything about it was verified.

It does not issue, and never writes a private key but the member's own renewed one.
"""

import shutil
from dataclasses import dataclass
from pathlib import Path

import msgspec

from cutlayer.errors import ConfigError, PermissionRefused
from cutlayer.identity.certificates import load_certificates
from cutlayer.identity.keys import (
    PrivateKey,
    certificate_fingerprint,
    is_same_fingerprint,
    key_fingerprint,
    load_key,
)
from cutlayer.identity.kit import (
    AUTHORITY_FILE,
    CERTIFICATE_FILE,
    REVOKED_FILE,
    Kit,
    KitNote,
    open_kit,
)
from cutlayer.identity.request import (
    KEY_FILE,
    MEMBER_FILE,
    NEXT_KEY_FILE,
    MemberNote,
    read_member,
)
from cutlayer.identity.revocation import parse_list, read_list
from cutlayer.storage.files import (
    explain_os_errors,
    private_folder,
    replace_folder,
    settle_folder,
    write_atomic,
)

__all__ = ["MemberFiles", "install", "member_files"]


@dataclass(frozen=True, kw_only=True)
class MemberFiles:
    """Where a member's TLS files are."""

    certificate: Path
    key: Path
    authority: Path
    revoked: Path

    @property
    def tls(self) -> dict[str, str]:
        """Section `tls` of a client's or a server's settings."""
        return {
            "certificate": str(self.certificate),
            "key": str(self.key),
            "authority": str(self.authority),
        }


def member_files(folder: Path) -> MemberFiles:
    """The TLS files of an installed member.

    Raises:
        ConfigError: the folder is not a member's.
    """
    settle_folder(folder)
    return MemberFiles(
        certificate=folder / CERTIFICATE_FILE,
        key=_key_path(folder, read_member(folder)),
        authority=folder / AUTHORITY_FILE,
        revoked=folder / REVOKED_FILE,
    )


def install(kit: Path, folder: Path, authority_fingerprint: str | None = None) -> KitNote:
    """Verify a kit against this member's key and its authority, and put it into place.

    A crash leaves the old files or the new ones, never a key with another key's certificate.

    Args:
        kit: zip file or folder from the federation's owner.
        folder: the member's folder, where the request was made.
        authority_fingerprint: as the owner read it out; needed for the first kit, afterwards the
            authority must be the installed one.

    Raises:
        PermissionRefused: changed kit, another authority, or not for this member's key.
        ConfigError: first kit without fingerprint, or no request was made in this folder.
        StorageError: unreadable or unwritable files.
    """
    settle_folder(folder)
    member = read_member(folder)
    private_folder(folder)
    opened = open_kit(kit)
    _check_authority(opened, folder, authority_fingerprint)
    key_path = _matching_key(opened, folder, member)
    _put(opened, folder, member, key_path)
    return opened.note


def _check_authority(kit: Kit, folder: Path, expected: str | None) -> None:
    found, installed = kit.note.authority_fingerprint, folder / AUTHORITY_FILE
    if expected is None:
        if not installed.exists():
            raise ConfigError(
                f"the kit's authority has fingerprint {found}; compare it with the federation's "
                "owner by telephone or on paper, and give what the owner reads out"
            )
        expected = certificate_fingerprint(load_certificates(installed)[0])
    if not is_same_fingerprint(found, expected):
        raise PermissionRefused(
            f"the kit comes from an authority with fingerprint {found}, expected {expected}; do "
            "not use it, ask the federation's owner"
        )


def _matching_key(kit: Kit, folder: Path, member: MemberNote) -> Path:
    candidates = [_key_path(folder, member), folder / NEXT_KEY_FILE]
    for path in candidates:
        if path.exists() and _is_for(kit, load_key(path)):
            return path
    raise PermissionRefused(
        f"the kit of {kit.note.name} was made for another key than the one in {folder}; install "
        "it where its request was made, or make a new request"
    )


def _is_for(kit: Kit, key: PrivateKey) -> bool:
    return is_same_fingerprint(key_fingerprint(key.public_key()), kit.note.key_fingerprint)


def _put(kit: Kit, folder: Path, member: MemberNote, key_path: Path) -> None:
    note = msgspec.structs.replace(
        member, name=kit.note.name, kind=kit.note.kind, hosts=kit.note.hosts
    )
    files = dict(kit.files)
    files[MEMBER_FILE] = msgspec.json.format(msgspec.json.encode(note), indent=2)
    revoked = _newest_list(kit, folder)
    if revoked is not None:
        files[REVOKED_FILE] = revoked

    def fill(new: Path) -> None:
        if folder.exists():
            shutil.copytree(folder, new, symlinks=True, dirs_exist_ok=True)
        for name, data in files.items():
            write_atomic(new / name, data, mode=0o644)
        if key_path.name == NEXT_KEY_FILE and key_path.parent == folder:
            (new / NEXT_KEY_FILE).replace(new / KEY_FILE)

    replace_folder(folder, fill)


def _newest_list(kit: Kit, folder: Path) -> bytes | None:
    """The installed list where it is newer than the kit's: a kit may lie around for a while."""
    path = folder / REVOKED_FILE
    if not path.exists():
        return None
    in_kit = parse_list(kit.files[REVOKED_FILE], "the kit's list", [kit.authority])
    if read_list(path, folder / AUTHORITY_FILE).number <= in_kit.number:
        return None
    with explain_os_errors(f"read {path}"):
        return path.read_bytes()


def _key_path(folder: Path, member: MemberNote) -> Path:
    return Path(member.key_file) if member.key_file is not None else folder / KEY_FILE
