"""The kit: what the federation's owner sends back, signed as a whole.

It does not issue (`authority`) nor put into place (`install`). A kit is a zip file or a folder with
`certificate.pem`, `authority.pem`, `revoked.pem` (the newest list), `kit.json` (`KitNote`) and
`kit.sig`, the authority's ECDSA signature over the bytes of `kit.json`, which names the SHA-256 of
the other files but the list, which is signed itself. It holds no secret.
"""

import base64
import binascii
import hashlib
import hmac
import io
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import msgspec
from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding

from cutlayer.errors import CutlayerError, PermissionRefused, StorageError
from cutlayer.identity.certificates import (
    EXTENDED_USAGE,
    MALFORMED,
    MemberKind,
    hosts_in,
    identify,
    parse_certificate,
)
from cutlayer.identity.keys import (
    certificate_fingerprint,
    check_key,
    key_fingerprint,
)
from cutlayer.identity.revocation import parse_list
from cutlayer.storage.files import explain_os_errors, write_atomic

__all__ = [
    "AUTHORITY_FILE",
    "CERTIFICATE_FILE",
    "REVOKED_FILE",
    "Kit",
    "KitNote",
    "note_for",
    "open_kit",
    "show_kit",
    "write_kit",
]

CERTIFICATE_FILE, AUTHORITY_FILE, REVOKED_FILE = "certificate.pem", "authority.pem", "revoked.pem"
NOTE_FILE, SIGNATURE_FILE = "kit.json", "kit.sig"
_FILES = (CERTIFICATE_FILE, AUTHORITY_FILE, REVOKED_FILE, NOTE_FILE, SIGNATURE_FILE)
_MAX_FILE_BYTES = 16 << 20
_VERSION = 1
_BAD_ZIP = (zipfile.BadZipFile, zlib.error, NotImplementedError, RuntimeError, EOFError, ValueError)


class KitNote(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What the owner grants, in readable form; signed."""

    version: int = _VERSION
    """Of this file format."""
    name: str
    """The member's name in the federation."""
    kind: MemberKind
    roles: tuple[str, ...]
    """Values of `Role`, sorted."""
    hosts: tuple[str, ...]
    """Where a server answers."""
    server_address: str | None
    """host:port of the trunk server, for clients."""
    serial: str
    """Certificate serial number, hex."""
    not_before: str
    """ISO 8601, UTC."""
    not_after: str
    """ISO 8601, UTC."""
    key_fingerprint: str
    """SHA-256 of the member's public key."""
    authority_name: str
    authority_fingerprint: str
    """SHA-256 of the authority's certificate: compare it by another way than the kit's."""
    certificate_sha256: str
    """Of the file, hex."""
    authority_sha256: str
    """Of the file, hex."""


@dataclass(frozen=True, kw_only=True)
class Kit:
    """A kit that is consistent in itself; whether its authority is the right one is open."""

    note: KitNote
    certificate: x509.Certificate
    authority: x509.Certificate
    files: Mapping[str, bytes]
    """By name, as they go into the member's folder."""


def note_for(
    certificate: x509.Certificate, authority: x509.Certificate, server_address: str | None
) -> KitNote:
    """The note that belongs to a certificate.

    Raises:
        PermissionRefused: the certificate is not a member's.
    """
    pem, authority_pem = (c.public_bytes(Encoding.PEM) for c in (certificate, authority))
    holder = identify(pem)
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    return KitNote(
        name=holder.name,
        kind=_kind(certificate),
        roles=tuple(sorted(holder.roles)),
        hosts=hosts_in(names),
        server_address=server_address,
        serial=f"{holder.serial:x}",
        not_before=certificate.not_valid_before_utc.isoformat(),
        not_after=certificate.not_valid_after_utc.isoformat(),
        key_fingerprint=key_fingerprint(check_key(certificate.public_key(), "the certificate")),
        authority_name=authority.subject.rfc4514_string(),
        authority_fingerprint=certificate_fingerprint(authority),
        certificate_sha256=hashlib.sha256(pem).hexdigest(),
        authority_sha256=hashlib.sha256(authority_pem).hexdigest(),
    )


def write_kit(
    path: Path,
    note: KitNote,
    key: ec.EllipticCurvePrivateKey,
    files: Mapping[str, bytes],
) -> None:
    """Sign a note and write the zip file.

    Args:
        path: where to.
        note: what is granted.
        key: the authority's private key.
        files: certificate, authority and revocation list, by name.
    """
    note_bytes = msgspec.json.format(msgspec.json.encode(note), indent=2)
    signature = base64.b64encode(key.sign(note_bytes, ec.ECDSA(SHA256()))) + b"\n"
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, data in {**files, NOTE_FILE: note_bytes, SIGNATURE_FILE: signature}.items():
            # A fixed date: two zips of one kit are equal to the byte.
            archive.writestr(zipfile.ZipInfo(name, (1980, 1, 1, 0, 0, 0)), data)
    write_atomic(path, buffer.getvalue(), mode=0o644)


def show_kit(path: Path) -> KitNote:
    """What a kit grants, and the authority's fingerprint to compare.

    Raises:
        PermissionRefused: it was changed.
        StorageError: it cannot be read.
    """
    return open_kit(path).note


def open_kit(path: Path) -> Kit:
    """Read a kit and verify that it is consistent and signed by the authority inside.

    Raises:
        PermissionRefused: something was changed; nothing of it may be used.
        StorageError: it cannot be read, or a file is missing.
    """
    files = _read_folder(path) if path.is_dir() else _read_zip(path)
    where = f"kit {path}"
    certificate = parse_certificate(files[CERTIFICATE_FILE], f"{where}: {CERTIFICATE_FILE}")
    authority = parse_certificate(files[AUTHORITY_FILE], f"{where}: {AUTHORITY_FILE}")
    _check_signature(files, authority, where)
    note = _parse_note(files[NOTE_FILE], where)
    _check_content(files, note, where)
    _check_issuer(certificate, authority, where)
    # The list is signed by itself; it is checked here so that a bad one is never installed.
    parse_list(files[REVOKED_FILE], f"{where}: {REVOKED_FILE}", [authority])
    if not _is_described(certificate, authority, note):
        raise _changed(where, f"{NOTE_FILE} does not describe {CERTIFICATE_FILE}")
    return Kit(note=note, certificate=certificate, authority=authority, files=files)


def _is_described(
    certificate: x509.Certificate, authority: x509.Certificate, note: KitNote
) -> bool:
    try:
        return note == note_for(certificate, authority, note.server_address)
    except (*MALFORMED, CutlayerError):
        return False


def _check_signature(files: Mapping[str, bytes], authority: x509.Certificate, where: str) -> None:
    key = authority.public_key()
    try:
        signature = base64.b64decode(files[SIGNATURE_FILE].strip(), validate=True)
        if not isinstance(key, ec.EllipticCurvePublicKey):
            raise _changed(where, f"{AUTHORITY_FILE} has no ECDSA key")
        key.verify(signature, files[NOTE_FILE], ec.ECDSA(SHA256()))
    except (binascii.Error, InvalidSignature) as error:
        raise _changed(where, f"{SIGNATURE_FILE} does not sign {NOTE_FILE}") from error


def _parse_note(data: bytes, where: str) -> KitNote:
    try:
        note = msgspec.json.decode(data, type=KitNote)
    except msgspec.DecodeError as error:
        raise StorageError(f"{where}: {NOTE_FILE} is not understood ({error})") from error
    if note.version != _VERSION:
        raise StorageError(
            f"{where} has format {note.version}, this program reads {_VERSION}; use the same "
            "version of cutlayer as the federation's owner"
        )
    return note


def _check_content(files: Mapping[str, bytes], note: KitNote, where: str) -> None:
    expected = {
        CERTIFICATE_FILE: note.certificate_sha256,
        AUTHORITY_FILE: note.authority_sha256,
    }
    for name, digest in expected.items():
        if not hmac.compare_digest(hashlib.sha256(files[name]).hexdigest(), digest):
            raise _changed(where, f"{name} is not the file that was signed")


def _check_issuer(certificate: x509.Certificate, authority: x509.Certificate, where: str) -> None:
    try:
        is_ca = authority.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
        authority.verify_directly_issued_by(authority)
        certificate.verify_directly_issued_by(authority)
    except (*MALFORMED, InvalidSignature) as error:
        raise _changed(where, f"{AUTHORITY_FILE} did not issue {CERTIFICATE_FILE}") from error
    if not is_ca:
        raise _changed(where, f"{AUTHORITY_FILE} is not an authority's certificate")


def _kind(certificate: x509.Certificate) -> MemberKind:
    usages = certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    kinds = [kind for kind, usage in EXTENDED_USAGE.items() if list(usages) == [usage]]
    if len(kinds) != 1:
        raise PermissionRefused("the certificate is neither a client's nor a server's")
    return kinds[0]


def _changed(where: str, what: str) -> PermissionRefused:
    return PermissionRefused(
        f"{where}: {what}. It was changed or damaged on the way; install nothing of it and ask "
        "the federation's owner to send it again"
    )


def _read_folder(path: Path) -> dict[str, bytes]:
    files = {}
    for name in _FILES:
        with explain_os_errors(f"read kit {path}"), (path / name).open("rb") as file:
            files[name] = file.read(_MAX_FILE_BYTES)
    return files


def _read_zip(path: Path) -> dict[str, bytes]:
    with explain_os_errors(f"read kit {path}"):
        data = path.read_bytes() if path.stat().st_size <= _MAX_FILE_BYTES else b""
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            return {name: _read_entry(archive, name, path) for name in _FILES}
    except KeyError as error:
        raise StorageError(
            f"kit {path} lacks a file ({error.args[0]}); ask for it again"
        ) from error
    except _BAD_ZIP as error:
        raise StorageError(f"kit {path} is not a complete zip file; ask for it again") from error


def _read_entry(archive: zipfile.ZipFile, name: str, path: Path) -> bytes:
    # A small zip may unpack to something huge: never read more than the limit.
    with archive.open(name) as file:
        data = file.read(_MAX_FILE_BYTES + 1)
    if len(data) > _MAX_FILE_BYTES:
        raise StorageError(f"kit {path}: {name} is too large to be part of a kit")
    return data
