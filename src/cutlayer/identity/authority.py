"""The federation's owner: approves requests, issues kits, revokes.

It does not see any private key but its own. Everything granted or revoked is a durable line in
`issued.jsonl` BEFORE it is signed, so no certificate exists that the register does not know; the
revocation list is made from that register.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey
from cryptography.hazmat.primitives.serialization import Encoding

from cutlayer.errors import ConfigError, PermissionRefused, StorageError
from cutlayer.identity.certificates import (
    CLOCK_SKEW,
    EXTENDED_USAGE,
    MemberKind,
    Role,
    alternative_names,
    check_name,
    issue,
    load_certificates,
    self_signed_authority,
    subject,
)
from cutlayer.identity.keys import (
    PublicKey,
    certificate_fingerprint,
    is_same_fingerprint,
    key_fingerprint,
    load_key,
    new_key,
    save_key,
)
from cutlayer.identity.kit import (
    AUTHORITY_FILE,
    CERTIFICATE_FILE,
    REVOKED_FILE,
    note_for,
    write_kit,
)
from cutlayer.identity.register import Grant, Register
from cutlayer.identity.request import Request, open_request
from cutlayer.identity.revocation import Reason, sign_list
from cutlayer.storage.files import explain_os_errors, private_folder, write_atomic

__all__ = ["Authority", "approve", "init_authority", "open_authority", "publish_list", "revoke"]

AUTHORITY_KEY_FILE = "authority-key.pem"
_AUTHORITY_DAYS, _MAX_DAYS, _LIST_DAYS = 3652, 825, 30
_ROLES = {
    MemberKind.CLIENT: frozenset({Role.TRAIN, Role.GENERATE, Role.ADMINISTER}),
    MemberKind.SERVER: frozenset({Role.SERVE}),
}


@dataclass(frozen=True, kw_only=True)
class Authority:
    """The owner's folder, opened: certificate and private key."""

    folder: Path
    certificate: x509.Certificate
    key: EllipticCurvePrivateKey
    now: Callable[[], datetime]

    @property
    def fingerprint(self) -> str:
        """What every participant compares before installing its first kit."""
        return certificate_fingerprint(self.certificate)


def _utc_now() -> datetime:
    return datetime.now(UTC)


def init_authority(
    folder: Path,
    name: str,
    passphrase: bytes | None = None,
    now: Callable[[], datetime] = _utc_now,
) -> Authority:
    """Make the federation's authority in a new private folder, for ten years.

    Args:
        folder: mode 0700; back it up, it cannot be made again.
        name: of the federation.
        passphrase: encrypts the private key; None leaves it to the file's mode.
        now: the clock, timezone-aware.

    Raises:
        ConfigError: the folder holds an authority already, or a malformed name.
        StorageError: the folder is open to others or cannot be written.
    """
    check_name(name)
    private_folder(folder)
    if (folder / AUTHORITY_FILE).exists():
        raise ConfigError(f"{folder} holds an authority already; every member depends on it")
    key, begin = new_key(), now()
    certificate = self_signed_authority(
        name, key, begin - CLOCK_SKEW, begin + timedelta(days=_AUTHORITY_DAYS)
    )
    save_key(folder / AUTHORITY_KEY_FILE, key, passphrase)
    authority = Authority(folder=folder, certificate=certificate, key=key, now=now)
    publish_list(authority)
    # Last, so that a folder with this file is complete.
    write_atomic(folder / AUTHORITY_FILE, certificate.public_bytes(Encoding.PEM), mode=0o644)
    return authority


def open_authority(
    folder: Path, passphrase: bytes | None = None, now: Callable[[], datetime] = _utc_now
) -> Authority:
    """Open the owner's folder.

    Raises:
        ConfigError: it holds no authority.
        StorageError: it or its key is open to others, or the passphrase is wrong or missing.
    """
    if not (folder / AUTHORITY_FILE).exists():
        raise ConfigError(f"{folder} holds no authority; run `cutlayer provision init` first")
    private_folder(folder)
    certificate = load_certificates(folder / AUTHORITY_FILE)[0]
    key = load_key(folder / AUTHORITY_KEY_FILE, passphrase)
    if not isinstance(key, EllipticCurvePrivateKey) or (
        key.public_key() != certificate.public_key()
    ):
        raise StorageError(
            f"{folder / AUTHORITY_KEY_FILE} is not the key of {AUTHORITY_FILE}; restore both from "
            "one backup"
        )
    return Authority(folder=folder, certificate=certificate, key=key, now=now)


def approve(
    authority: Authority,
    request_file: Path,
    roles: Iterable[str],
    days: int = 365,
    *,
    fingerprint: str,
    name: str | None = None,
    server_address: str | None = None,
    replaces: bool = False,
) -> Path:
    """Grant a request and write the signed kit; returns its path.

    Args:
        authority: who grants.
        request_file: the participant's signing request.
        roles: what a client may do (`train`, `generate`, `administer`); a server has `serve`.
        days: validity.
        fingerprint: as the participant read it out, over the telephone or on paper: not taken
            from the file, or whoever changed the file on its way is approved.
        name: name in the federation; None grants the wanted one.
        server_address: host:port of the trunk server, written into the kit.
        replaces: allow a new key for a name that holds a valid certificate with another key.

    Raises:
        PermissionRefused: another fingerprint, or the name or key belongs to somebody else.
        ConfigError: malformed request, roles that do not fit, too many days.
        StorageError: a file cannot be read or written.
    """
    asked, key = open_request(request_file)
    if not is_same_fingerprint(asked.fingerprint, fingerprint):
        raise PermissionRefused(
            f"the fingerprint read out is not that of {request_file} ({asked.fingerprint}); the "
            "file may be somebody else's: approve nothing and ask the participant"
        )
    granted = _check_roles(asked.kind, roles)
    grant = _make_grant(authority, asked, check_name(name or asked.name), granted, days)
    with Register.open(authority.folder) as register:
        register.check_free(grant, authority.now(), replaces)
        register.add(grant, authority.now())
    certificate = _issue(authority, grant, asked, key)
    return _write_kit(authority, certificate, server_address)


def revoke(
    authority: Authority,
    who: str | int,
    reason: Reason = Reason.UNSPECIFIED,
    publish: Sequence[Path] = (),
) -> tuple[int, ...]:
    """Revoke certificates and write a new signed list; returns their serial numbers.

    Args:
        authority: who revokes.
        who: a member's name (all its certificates that are still valid) or one serial number.
        reason: recorded in the list.
        publish: further files to write the list to, such as a local server's.

    Raises:
        ConfigError: no valid certificate of that name or serial number.
        StorageError: a file cannot be written; run it again then.
    """
    with Register.open(authority.folder) as register:
        serials = register.revoke(who, reason, authority.now())
    publish_list(authority, publish)
    return serials


def publish_list(authority: Authority, publish: Sequence[Path] = ()) -> int:
    """Sign the list again, with a new date and number; returns the number.

    Do this within 30 days even if nobody was revoked, or readers warn.

    Raises:
        StorageError: a file cannot be written.
    """
    now = authority.now()
    with Register.open(authority.folder) as register:
        number = register.next_list_number(now)
        revoked = register.revoked()
    dates = (now, now + timedelta(days=_LIST_DAYS))
    pem = sign_list(revoked, number, authority.certificate, authority.key, dates)
    for path in (authority.folder / REVOKED_FILE, *publish):
        write_atomic(path, pem, mode=0o644)
    return number


def _check_roles(kind: MemberKind, roles: Iterable[str]) -> frozenset[Role]:
    wanted, possible = frozenset(roles), _ROLES[kind]
    if not wanted or not wanted <= possible:
        raise ConfigError(
            f"roles {', '.join(sorted(wanted)) or '(none)'} do not fit a {kind}; choose from "
            f"{', '.join(sorted(possible))}"
        )
    return frozenset(Role(role) for role in wanted)


def _make_grant(
    authority: Authority, asked: Request, name: str, roles: frozenset[Role], days: int
) -> Grant:
    now = authority.now()
    if not 1 <= days <= _MAX_DAYS:
        raise ConfigError(f"days={days}: choose 1 to {_MAX_DAYS}")
    end, last = now + timedelta(days=days), authority.certificate.not_valid_after_utc
    if end > last:
        raise ConfigError(
            f"days={days} goes beyond the authority's own end on {last.date().isoformat()}; "
            "choose fewer, or start a new authority"
        )
    return Grant(
        name=name,
        kind=asked.kind,
        roles=tuple(sorted(roles)),
        serial=f"{x509.random_serial_number():x}",
        not_after=end.astimezone(UTC).isoformat(timespec="seconds"),
        fingerprint=asked.fingerprint,
    )


def _issue(authority: Authority, grant: Grant, asked: Request, key: PublicKey) -> x509.Certificate:
    assert key_fingerprint(key) == grant.fingerprint
    template = (
        x509.CertificateBuilder()
        .subject_name(subject(grant.name))
        .serial_number(int(grant.serial, 16))
        .not_valid_before(authority.now() - CLOCK_SKEW)
        .not_valid_after(datetime.fromisoformat(grant.not_after))
        .add_extension(
            alternative_names(grant.name, map(Role, grant.roles), asked.hosts), critical=False
        )
    )
    usage = EXTENDED_USAGE[grant.kind]
    return issue(template, key, authority.certificate, authority.key, usage)


def _write_kit(
    authority: Authority, certificate: x509.Certificate, server_address: str | None
) -> Path:
    with explain_os_errors("read the revocation list"):
        revoked = (authority.folder / REVOKED_FILE).read_bytes()
    note = note_for(certificate, authority.certificate, server_address)
    files = {
        CERTIFICATE_FILE: certificate.public_bytes(Encoding.PEM),
        AUTHORITY_FILE: authority.certificate.public_bytes(Encoding.PEM),
        REVOKED_FILE: revoked,
    }
    path = private_folder(authority.folder / "kits") / f"{note.name}-{note.serial[:8]}.kit.zip"
    write_kit(path, note, authority.key, files)
    return path
