"""What is wrong, or soon will be, with an installed member's files; for `doctor` and at start.

It does not repair anything and raises nothing: every problem is a finding.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature

from cutlayer.errors import CutlayerError
from cutlayer.identity.certificates import MALFORMED, expiry_warning, load_certificates
from cutlayer.identity.install import MemberFiles, member_files
from cutlayer.identity.keys import load_key
from cutlayer.identity.kit import open_kit
from cutlayer.identity.revocation import read_list
from cutlayer.storage.files import private_folder

__all__ = ["Finding", "check_kit"]


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One problem."""

    is_error: bool
    """True: a connection will fail or is unsafe. False: look at it soon."""
    path: Path
    text: str
    """What, where and what to do."""


def check_kit(folder: Path, now: datetime | None = None) -> list[Finding]:
    """Every problem of a member's folder; empty when all is well.

    Args:
        folder: the member's folder.
        now: the time to judge by, timezone-aware; None is the present.
    """
    found = list(_findings(folder, now or datetime.now(UTC)))
    if not any(finding.is_error for finding in found):
        # What the single files cannot show: that they are those which the owner signed.
        found += _tried(folder, lambda: open_kit(folder))
    return found


def _findings(folder: Path, now: datetime) -> Iterator[Finding]:
    if not folder.exists():
        yield _error(folder, f"{folder} does not exist; make a request there first")
        return
    yield from _tried(folder, lambda: private_folder(folder))
    try:
        files = member_files(folder)
    except CutlayerError as error:
        yield _error(folder, str(error))
        return
    missing = [p for p in (files.certificate, files.key, files.authority) if not p.exists()]
    for path in missing:
        yield _error(path, f"{path} is missing; install the kit (again)")
    if not missing:
        yield from _check_files(folder, files, now)


def _check_files(folder: Path, files: MemberFiles, now: datetime) -> Iterator[Finding]:
    try:
        certificate = load_certificates(files.certificate)[0]
        authority = load_certificates(files.authority)[0]
    except CutlayerError as error:
        yield _error(files.certificate, str(error))
        return
    yield from _check_key(files, certificate)
    yield from _check_issuer(files, certificate, authority)
    yield from _check_dates(files.certificate, "the certificate", certificate, now)
    yield from _check_dates(files.authority, "the authority's certificate", authority, now)
    yield from _check_revoked(files, certificate, now)


def _check_key(files: MemberFiles, certificate: x509.Certificate) -> Iterator[Finding]:
    try:
        key = load_key(files.key)
    except CutlayerError as error:
        yield _error(files.key, str(error))
        return
    if key.public_key() != certificate.public_key():
        text = f"{files.key} is not the key of {files.certificate}; install the kit for this key"
        yield _error(files.key, text)


def _check_issuer(
    files: MemberFiles, certificate: x509.Certificate, authority: x509.Certificate
) -> Iterator[Finding]:
    try:
        certificate.verify_directly_issued_by(authority)
    except (*MALFORMED, InvalidSignature):
        text = f"{files.authority} did not issue {files.certificate}; install the kit again"
        yield _error(files.authority, text)


def _check_dates(
    path: Path, what: str, certificate: x509.Certificate, now: datetime
) -> Iterator[Finding]:
    begin = certificate.not_valid_before_utc
    if now < begin:
        text = f"{what} {path} is not valid before {begin.isoformat()}; check this machine's clock"
        yield _error(path, text)
    warning = expiry_warning(certificate, f"{what} {path}", now)
    if warning is not None:
        yield Finding(
            is_error=certificate.not_valid_after_utc < now,
            path=path,
            text=warning,
        )


def _check_revoked(
    files: MemberFiles, certificate: x509.Certificate, now: datetime
) -> Iterator[Finding]:
    if not files.revoked.exists():
        text = f"{files.revoked} is missing; get the revocation list from the federation's owner"
        yield _error(files.revoked, text)
        return
    try:
        current = read_list(files.revoked, files.authority)
    except CutlayerError as error:
        yield _error(files.revoked, str(error))
        return
    if certificate.serial_number in current.serials:
        text = f"{files.certificate} is revoked; ask the federation's owner"
        yield _error(files.certificate, text)
    if current.next_update is not None and current.next_update < now:
        text = f"{files.revoked} is out of date; get the newest from the federation's owner"
        yield Finding(is_error=False, path=files.revoked, text=text)


def _tried(path: Path, action: Callable[[], object]) -> Iterator[Finding]:
    try:
        action()
    except CutlayerError as error:
        yield _error(path, str(error))


def _error(path: Path, text: str) -> Finding:
    return Finding(is_error=True, path=path, text=text)
