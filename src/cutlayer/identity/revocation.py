"""The signed list of revoked certificates (an X.509 CRL), and its reader at the server.

It does not decide who is revoked (`authority`) nor close connections (`wire` asks `is_revoked`).
Lists are numbered. A reader never goes back: a list that is older than one it has seen, badly
signed, cut short or missing leaves the last good one in force, with a warning. A list past its own
date stays in force too, with a warning: forgetting revocations would be worse than an old list.
"""

import logging
import os
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path

import msgspec
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding

from cutlayer.errors import StorageError
from cutlayer.identity.certificates import MALFORMED, load_certificates
from cutlayer.identity.keys import PublicKey, certificate_fingerprint
from cutlayer.storage.files import explain_os_errors, write_atomic

__all__ = [
    "Reason",
    "Revocation",
    "RevocationList",
    "SignedList",
    "install_revocations",
    "parse_list",
    "read_list",
    "sign_list",
]

_log = logging.getLogger(__name__)
_MAX_LIST_BYTES = 16 << 20


class Reason(StrEnum):
    """Why a certificate is revoked; values are those of X.509."""

    UNSPECIFIED = "unspecified"
    KEY_COMPROMISE = "keyCompromise"
    AFFILIATION_CHANGED = "affiliationChanged"
    SUPERSEDED = "superseded"
    CESSATION_OF_OPERATION = "cessationOfOperation"
    PRIVILEGE_WITHDRAWN = "privilegeWithdrawn"


@dataclass(frozen=True, kw_only=True)
class Revocation:
    """When and why one certificate was revoked."""

    when: datetime
    reason: Reason


@dataclass(frozen=True, kw_only=True)
class SignedList:
    """A list whose signature was verified."""

    number: int
    """Grows with every list of the authority."""
    serials: frozenset[int]
    """Serial numbers of revoked certificates."""
    next_update: datetime | None
    """When the authority promised a newer one."""
    authority_fingerprint: str
    """Who signed it."""


class RevocationList:
    """A list file that may be replaced at any time; asked at every call. Thread-safe."""

    def __init__(
        self,
        path: Path,
        authority: Path,
        seen: Path | None = None,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        """Load the list.

        Args:
            path: the list in PEM form.
            authority: the authority's certificate.
            seen: file that remembers the newest list's number across restarts; by default
                `.NAME.seen` beside the list.
            now: the clock, timezone-aware.

        Raises:
            StorageError: missing, unreadable, not signed by the authority, or older than seen.
        """
        self._path, self._authority, self._now = path, authority, now
        self._seen = seen or path.with_name(f".{path.name}.seen")
        self._lock = threading.Lock()
        self._problem: str | None = None
        self._stamp = _stamp(path)
        self._list = read_list(path, authority)
        oldest = _read_seen(self._seen, self._list.authority_fingerprint)
        if self._list.number < oldest:
            raise StorageError(_too_old(path, self._list.number, oldest))
        self._remember()

    @property
    def current(self) -> SignedList:
        """The list in force."""
        return self._list

    def is_revoked(self, serial: int) -> bool:
        """Whether the certificate is revoked, by the file as it is now. Costs one `stat`."""
        stamp = _stamp(self._path)
        if stamp != self._stamp:
            with self._lock:
                if stamp != self._stamp:
                    self._reload()
                    self._stamp = stamp
        return serial in self._list.serials

    def warnings(self) -> list[str]:
        """What the operator should look at; empty when all is well."""
        found = [self._problem] if self._problem else []
        limit = self._list.next_update
        if limit is not None and limit < self._now():
            found.append(
                f"{self._path} was due for renewal on {limit.date().isoformat()} and is still "
                "used; get the newest list from the federation's owner"
            )
        return found

    def _reload(self) -> None:
        try:
            newer = read_list(self._path, self._authority)
            is_same = newer == self._list
            if newer.number <= self._list.number and not is_same:
                raise StorageError(_too_old(self._path, newer.number, self._list.number))
        except StorageError as error:
            self._problem = f"the last good revocation list stays in force: {error}"
            _log.warning("%s", self._problem)
            return
        self._list, self._problem = newer, None
        self._remember()

    def _remember(self) -> None:
        seen = {self._list.authority_fingerprint: self._list.number}
        try:
            write_atomic(self._seen, msgspec.json.encode(seen))
        except StorageError as error:
            self._problem = f"an older revocation list would be accepted after a restart: {error}"
            _log.warning("%s", self._problem)


def sign_list(
    revoked: Mapping[int, Revocation],
    number: int,
    authority: x509.Certificate,
    key: EllipticCurvePrivateKey,
    dates: tuple[datetime, datetime],
) -> bytes:
    """A list in PEM form.

    Args:
        revoked: by serial number.
        number: larger than that of every list before.
        authority: who signs.
        key: its private key.
        dates: when it is made and when a newer one is promised.
    """
    identifier = authority.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
    builder = (
        x509.CertificateRevocationListBuilder()
        .issuer_name(authority.subject)
        .last_update(dates[0])
        .next_update(dates[1])
        .add_extension(x509.CRLNumber(number), critical=False)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(identifier),
            critical=False,
        )
    )
    for serial, revocation in sorted(revoked.items()):
        entry = (
            x509.RevokedCertificateBuilder()
            .serial_number(serial)
            .revocation_date(revocation.when)
            .add_extension(x509.CRLReason(x509.ReasonFlags(revocation.reason)), critical=False)
        )
        builder = builder.add_revoked_certificate(entry.build())
    return builder.sign(key, SHA256()).public_bytes(Encoding.PEM)


def read_list(path: Path, authority: Path) -> SignedList:
    """Read and verify a list.

    Raises:
        StorageError: missing, malformed, too large, or not signed by the authority.
    """
    with explain_os_errors(f"read revocation list {path}"), path.open("rb") as file:
        data = file.read(_MAX_LIST_BYTES + 1)
    return parse_list(data, str(path), load_certificates(authority))


def parse_list(data: bytes, where: str, authorities: list[x509.Certificate]) -> SignedList:
    """As `read_list`, from bytes.

    Args:
        data: PEM.
        where: for error texts.
        authorities: certificates of which one must have signed.
    """
    if len(data) > _MAX_LIST_BYTES:
        raise StorageError(f"{where} is larger than {_MAX_LIST_BYTES} bytes; get it again")
    try:
        crl = x509.load_pem_x509_crl(data)
        number = crl.extensions.get_extension_for_class(x509.CRLNumber).value.crl_number
        serials = frozenset(entry.serial_number for entry in crl)
    except MALFORMED as error:
        raise StorageError(f"{where} is not a complete revocation list; get it again") from error
    for authority in authorities:
        if crl.issuer == authority.subject and _is_signed(crl, authority):
            return SignedList(
                number=number,
                serials=serials,
                next_update=crl.next_update_utc,
                authority_fingerprint=certificate_fingerprint(authority),
            )
    raise StorageError(f"{where} is not signed by this federation's authority; do not use it")


def install_revocations(source: Path, folder: Path) -> SignedList:
    """Put a newer list into a member's folder, verified first; a running server sees it at once.

    Args:
        source: the list from the federation's owner.
        folder: the member's folder, with `authority.pem`.

    Raises:
        StorageError: not signed by the authority, older than the one there, or not writable.
    """
    newer, target = read_list(source, folder / "authority.pem"), folder / "revoked.pem"
    if target.exists():
        current = read_list(target, folder / "authority.pem")
        if newer.number < current.number:
            raise StorageError(_too_old(source, newer.number, current.number))
    with explain_os_errors(f"read {source}"):
        write_atomic(target, source.read_bytes(), mode=0o644)
    return newer


def _is_signed(crl: x509.CertificateRevocationList, authority: x509.Certificate) -> bool:
    key = authority.public_key()
    return isinstance(key, PublicKey) and crl.is_signature_valid(key)


def _stamp(path: Path) -> tuple[int, int, int] | None:
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_mtime_ns, status.st_size, status.st_ino


def _read_seen(path: Path, authority_fingerprint: str) -> int:
    """Number of the newest list seen of this authority, 0 for none."""
    if not path.exists():
        return 0
    with explain_os_errors(f"read {path}"):
        data = path.read_bytes()
    try:
        return msgspec.json.decode(data, type=dict[str, int]).get(authority_fingerprint, 0)
    except msgspec.DecodeError as error:
        raise StorageError(f"{path} is damaged; remove it after checking the list") from error


def _too_old(path: Path, number: int, newest: int) -> str:
    return (
        f"{path} is revocation list {number} but list {newest} was seen already; get the newest "
        "from the federation's owner"
    )
