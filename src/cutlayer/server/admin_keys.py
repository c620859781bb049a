"""Certificates for the link between a front and its replicas, made anew at each start.

They are of an authority that nobody else knows and whose key is never written: no member of the
federation can reach a replica's orders, and the front can do nothing at the members' listener.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
)

from cutlayer.identity.certificates import (
    CLOCK_SKEW,
    EXTENDED_USAGE,
    MemberKind,
    Role,
    alternative_names,
    issue,
    self_signed_authority,
    subject,
)
from cutlayer.identity.keys import new_key
from cutlayer.storage.files import private_folder, write_atomic
from cutlayer.wire.endpoints import TlsFiles

__all__ = ["REPLICA_HOST", "AdminKeys", "make_admin_keys"]

REPLICA_HOST = "replica.cutlayer.invalid"
"""What every replica's certificate is for, wherever it listens."""

_LIFE = timedelta(days=3650)


@dataclass(frozen=True)
class _Authority:
    certificate: x509.Certificate
    key: EllipticCurvePrivateKey
    begin: datetime


@dataclass(frozen=True, kw_only=True)
class AdminKeys:
    """Files of both ends of the link."""

    front: TlsFiles
    replica: TlsFiles
    """One for all replicas: the front tells them apart by where it started them."""


def make_admin_keys(folder: Path) -> AdminKeys:
    """Write fresh keys and certificates into `folder`, over those of an earlier start.

    Raises:
        StorageError: the folder is open to others or cannot be written.
    """
    private_folder(folder)
    begin, key = datetime.now(UTC) - CLOCK_SKEW, new_key()
    certificate = self_signed_authority("replicas", key, begin, begin + _LIFE)
    authority = _Authority(certificate, key, begin)
    return AdminKeys(
        front=_write(folder, "front", authority, MemberKind.CLIENT, ()),
        replica=_write(folder, "replica", authority, MemberKind.SERVER, (REPLICA_HOST,)),
    )


def _write(
    folder: Path, name: str, authority: _Authority, kind: MemberKind, hosts: Iterable[str]
) -> TlsFiles:
    key = new_key()
    template = (
        x509.CertificateBuilder()
        .subject_name(subject(name))
        .serial_number(x509.random_serial_number())
        .not_valid_before(authority.begin)
        .not_valid_after(authority.begin + _LIFE)
        .add_extension(alternative_names(name, [Role.SERVE], hosts), critical=False)
    )
    certificate = issue(
        template, key.public_key(), authority.certificate, authority.key, EXTENDED_USAGE[kind]
    )
    files = TlsFiles(
        certificate=folder / f"{name}.pem",
        key=folder / f"{name}-key.pem",
        authority=folder / "authority.pem",
    )
    private = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    write_atomic(files.key, private)
    write_atomic(files.certificate, certificate.public_bytes(Encoding.PEM))
    write_atomic(files.authority, authority.certificate.public_bytes(Encoding.PEM))
    return files
