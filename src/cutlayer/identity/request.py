"""A participant's side before approval: make a key that stays here, and a signing request.

It does not judge requests (`authority`) nor install what comes back (`kit`).
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import msgspec
from cryptography import x509
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import NameOID

from cutlayer.errors import ConfigError, StorageError
from cutlayer.identity.certificates import (
    EXTENDED_USAGE,
    MALFORMED,
    MemberKind,
    alternative_names,
    check_hosts,
    check_name,
    hosts_in,
    subject,
)
from cutlayer.identity.keys import (
    PrivateKey,
    PublicKey,
    check_key,
    key_fingerprint,
    load_key,
    new_key,
    save_key,
)
from cutlayer.storage.files import explain_os_errors, private_folder, write_atomic

__all__ = [
    "KEY_FILE",
    "MEMBER_FILE",
    "NEXT_KEY_FILE",
    "REQUEST_FILE",
    "MemberNote",
    "Request",
    "open_request",
    "read_member",
    "renew",
    "request",
    "show_request",
]

KEY_FILE, NEXT_KEY_FILE = "key.pem", "key-next.pem"
REQUEST_FILE, MEMBER_FILE = "request.csr", "member.json"
_MAX_REQUEST_BYTES = 64 << 10


@dataclass(frozen=True, kw_only=True)
class Request:
    """What a signing request asks for; nothing of it is granted."""

    path: Path
    """The file to send to the federation's owner; it holds no secret."""
    name: str
    """Wanted name."""
    kind: MemberKind
    """Client or server."""
    hosts: tuple[str, ...]
    """Where a server will answer."""
    fingerprint: str
    """SHA-256 of the public key: both people compare it by another way than the file's."""


class MemberNote(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """This machine's own note beside its key; it never leaves."""

    name: str
    kind: MemberKind
    hosts: tuple[str, ...] = ()
    key_file: str | None = None
    """A private key that stays where it was; None is `key.pem` in the folder."""


def request(
    folder: Path,
    name: str,
    kind: MemberKind = MemberKind.CLIENT,
    hosts: Iterable[str] = (),
    key_file: Path | None = None,
) -> Request:
    """Make a private key and a signing request in a private folder.

    Asked again before a kit is installed, it keeps the key, so that the fingerprint stays.

    Args:
        folder: where key and, later, certificates of this member live; mode 0700.
        name: wanted name in the federation.
        kind: client or server.
        hosts: DNS names and IP addresses of a server.
        key_file: use this private key, which stays where it is.

    Raises:
        ConfigError: malformed name or host, or the folder has a certificate already (`renew`).
        StorageError: the folder or key is open to others, or cannot be written.
    """
    note = MemberNote(
        name=check_name(name),
        kind=MemberKind(kind),
        hosts=check_hosts(MemberKind(kind), hosts),
        key_file=None if key_file is None else str(key_file.resolve()),
    )
    private_folder(folder)
    if (folder / "certificate.pem").exists():
        raise ConfigError(f"{folder} holds a certificate already; renew it or use another folder")
    path = folder / KEY_FILE
    if key_file is None and not path.exists():
        save_key(path, new_key())
    return _write(folder, note, load_key(key_file or path))


def renew(folder: Path, new: bool = False, hosts: Iterable[str] | None = None) -> Request:
    """Make a signing request for an installed certificate; the installed one stays in use.

    Args:
        folder: the member's folder.
        new: with a new key, kept aside until its kit is installed.
        hosts: other hosts of a server; None keeps them.

    Raises:
        ConfigError: nothing is installed, or a new key is asked for a key kept elsewhere.
        StorageError: unreadable files.
    """
    note = read_member(folder)
    if hosts is not None:
        note = msgspec.structs.replace(note, hosts=check_hosts(note.kind, hosts))
    if not new:
        return _write(folder, note, load_key(Path(note.key_file or folder / KEY_FILE)))
    if note.key_file is not None:
        raise ConfigError(
            f"the key of {folder} is kept in {note.key_file}; make a new key there and request "
            "into a new folder"
        )
    path = folder / NEXT_KEY_FILE
    if not path.exists():
        save_key(path, new_key())
    return _write(folder, note, load_key(path))


def show_request(path: Path) -> Request:
    """What a request file asks for, and the fingerprint to compare.

    Raises:
        ConfigError: malformed, wrongly signed, or a key or name that is not allowed.
        StorageError: the file cannot be read.
    """
    return open_request(path)[0]


def open_request(path: Path) -> tuple[Request, PublicKey]:
    """As `show_request`, with the key that it is for."""
    with explain_os_errors(f"read request {path}"), path.open("rb") as file:
        data = file.read(_MAX_REQUEST_BYTES + 1)
    try:
        csr = x509.load_pem_x509_csr(data[:_MAX_REQUEST_BYTES])
        is_signed = csr.is_signature_valid
        names = csr.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        usages = csr.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
        common = csr.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
    except MALFORMED as error:
        raise ConfigError(f"{path} is not a request that `cutlayer provision` made") from error
    kinds = [kind for kind, usage in EXTENDED_USAGE.items() if list(usages) == [usage]]
    if not is_signed or len(kinds) != 1 or len(common) != 1:
        raise ConfigError(f"{path} is damaged or was changed; ask the participant to send it again")
    key = check_key(csr.public_key(), str(path))
    found = Request(
        path=path,
        name=check_name(str(common[0].value)),
        kind=kinds[0],
        hosts=check_hosts(kinds[0], hosts_in(names)),
        fingerprint=key_fingerprint(key),
    )
    return found, key


def read_member(folder: Path) -> MemberNote:
    """The note beside a member's key.

    Raises:
        ConfigError: the folder is not a member's.
        StorageError: the note is damaged.
    """
    path = folder / MEMBER_FILE
    if not path.exists():
        raise ConfigError(f"{folder} has no {MEMBER_FILE}; run `cutlayer provision request` there")
    with explain_os_errors(f"read {path}"):
        data = path.read_bytes()
    try:
        return msgspec.json.decode(data, type=MemberNote)
    except msgspec.DecodeError as error:
        raise StorageError(f"{path} is damaged ({error}); make a new request") from error


def _write(folder: Path, note: MemberNote, key: PrivateKey) -> Request:
    csr = (
        x509.CertificateSigningRequestBuilder()
        .subject_name(subject(note.name))
        .add_extension(alternative_names(note.name, (), note.hosts), critical=False)
        .add_extension(x509.ExtendedKeyUsage([EXTENDED_USAGE[note.kind]]), critical=False)
        .sign(key, SHA256())
    )
    write_atomic(folder / MEMBER_FILE, msgspec.json.format(msgspec.json.encode(note), indent=2))
    write_atomic(folder / REQUEST_FILE, csr.public_bytes(Encoding.PEM), mode=0o644)
    return show_request(folder / REQUEST_FILE)
