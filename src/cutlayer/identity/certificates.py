"""What our certificates say: a name, roles, hosts, and until when.

It signs for others (`issue`) but does not decide for whom (`authority`). A member's certificate
carries `urn:cutlayer:name:NAME` once and `urn:cutlayer:role:ROLE` per role as URIs in its subject
alternative name; servers also have their DNS names and IP addresses there.
"""

import hashlib
import ipaddress
import re
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from cutlayer.errors import ConfigError, PermissionRefused, StorageError
from cutlayer.identity.keys import PublicKey
from cutlayer.storage.files import explain_os_errors

__all__ = [
    "CLOCK_SKEW",
    "EXTENDED_USAGE",
    "MALFORMED",
    "WARN_DAYS",
    "Identity",
    "MemberKind",
    "Role",
    "alternative_names",
    "check_hosts",
    "check_name",
    "days_left",
    "expiry_warning",
    "hosts_in",
    "identify",
    "issue",
    "load_certificates",
    "parse_certificate",
    "self_signed_authority",
    "subject",
]

CLOCK_SKEW = timedelta(minutes=5)
"""Certificates begin this much in the past: members' clocks differ."""
WARN_DAYS = 30
"""Days before expiry from which warnings are given."""

MALFORMED = (
    ValueError,
    TypeError,
    UnsupportedAlgorithm,
    x509.DuplicateExtension,
    x509.ExtensionNotFound,
    x509.InvalidVersion,
    x509.UnsupportedGeneralNameType,
)
"""What the parser raises for bytes that are no certificate, request or list of ours."""

_NAME_URI, _ROLE_URI = "urn:cutlayer:name:", "urn:cutlayer:role:"
_RESERVED = {"local", "plaintext"}
"""Logs call the operator and a peer without certificate so."""
_NAME = re.compile(r"[a-z0-9]([a-z0-9._-]{0,61}[a-z0-9])?")
_DNS = re.compile(r"(?=.{1,253}$)(\*\.)?[a-z0-9_]([a-z0-9_-]{0,61}[a-z0-9])?(\.[a-z0-9_-]{1,63})*")


class MemberKind(StrEnum):
    """Which end of a connection a certificate is for."""

    CLIENT = "client"
    SERVER = "server"


class Role(StrEnum):
    """What a certificate's holder may do."""

    TRAIN = "train"
    GENERATE = "generate"
    ADMINISTER = "administer"
    SERVE = "serve"


EXTENDED_USAGE = {
    MemberKind.CLIENT: ExtendedKeyUsageOID.CLIENT_AUTH,
    MemberKind.SERVER: ExtendedKeyUsageOID.SERVER_AUTH,
}


@dataclass(frozen=True, kw_only=True)
class Identity:
    """Whom a certificate names."""

    name: str
    """The member's name in the federation."""
    roles: frozenset[str]
    """Values of `Role`."""
    serial: int
    """Serial number of the certificate."""
    address: str
    """Network address, for logs; empty where there is none."""
    not_after: datetime
    """The certificate's end, UTC."""
    tls_key_sha256: bytes
    """SHA-256 of the DER SubjectPublicKeyInfo of its key; a member's evidence binds it."""


def identify(pem: bytes, address: str = "") -> Identity:
    """Read the holder out of a certificate whose chain TLS has verified already.

    Raises:
        PermissionRefused: not a certificate, not one of ours, or not exactly one valid name.
    """
    where = f"certificate from {address or 'peer'}"
    try:
        certificate = x509.load_pem_x509_certificate(pem)
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except MALFORMED as error:
        raise PermissionRefused(f"{where} is not one that `cutlayer provision` issued") from error
    uris = names.get_values_for_type(x509.UniformResourceIdentifier)
    found = [uri.removeprefix(_NAME_URI) for uri in uris if uri.startswith(_NAME_URI)]
    if len(found) != 1 or not _NAME.fullmatch(found[0]):
        raise PermissionRefused(f"{where} must carry exactly one member name; ask for a new kit")
    # A role that this version does not know gives no right.
    roles = frozenset(role.value for role in Role if _ROLE_URI + role in uris)
    return Identity(
        name=found[0],
        roles=roles,
        serial=certificate.serial_number,
        address=address,
        not_after=certificate.not_valid_after_utc,
        tls_key_sha256=_key_sha256(certificate),
    )


def issue(
    template: x509.CertificateBuilder,
    key: PublicKey,
    authority: x509.Certificate,
    authority_key: EllipticCurvePrivateKey,
    extended_usage: x509.ObjectIdentifier,
) -> x509.Certificate:
    """Sign a member's certificate.

    Args:
        template: subject, serial, dates and alternative names.
        key: the member's public key.
        authority: who signs.
        authority_key: its private key.
        extended_usage: client or server authentication.
    """
    identifier = authority.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
    return (
        template.issuer_name(authority.subject)
        .public_key(key)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(digital_signature=True), critical=True)
        .add_extension(x509.ExtendedKeyUsage([extended_usage]), critical=False)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(identifier),
            critical=False,
        )
        .sign(authority_key, SHA256())
    )


def self_signed_authority(
    name: str, key: EllipticCurvePrivateKey, begin: datetime, end: datetime
) -> x509.Certificate:
    """The federation's own certificate: it may sign members and revocation lists, nothing else."""
    identifier = x509.SubjectKeyIdentifier.from_public_key(key.public_key())
    return (
        x509.CertificateBuilder()
        .subject_name(subject(name))
        .issuer_name(subject(name))
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(begin)
        .not_valid_after(end)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(key_cert_sign=True, crl_sign=True), critical=True)
        .add_extension(identifier, critical=False)
        .sign(key, SHA256())
    )


def subject(name: str) -> x509.Name:
    """A distinguished name with a common name alone."""
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])


def alternative_names(
    name: str, roles: Iterable[Role], hosts: Iterable[str]
) -> x509.SubjectAlternativeName:
    """A certificate's subject alternative name: who, what it may, where it answers."""
    uris = [_NAME_URI + name, *(_ROLE_URI + role for role in sorted(roles))]
    general: list[x509.GeneralName] = [x509.UniformResourceIdentifier(uri) for uri in uris]
    for host in hosts:
        try:
            general.append(x509.IPAddress(ipaddress.ip_address(host)))
        except ValueError:
            general.append(x509.DNSName(host))
    return x509.SubjectAlternativeName(general)


def hosts_in(names: x509.SubjectAlternativeName) -> tuple[str, ...]:
    """DNS names and IP addresses of a subject alternative name."""
    addresses = [str(address) for address in names.get_values_for_type(x509.IPAddress)]
    return (*names.get_values_for_type(x509.DNSName), *addresses)


def check_name(name: str) -> str:
    """Refuse a name that is not fit for files, logs and certificates.

    Raises:
        ConfigError: with the rule.
    """
    if not _NAME.fullmatch(name):
        raise ConfigError(
            f"member name {name!r} is not allowed: 1 to 63 of a-z, 0-9, '.', '_', '-', beginning "
            "and ending with a letter or digit"
        )
    if name in _RESERVED:
        raise ConfigError(f"member name {name!r} has a meaning in the logs; choose another")
    return name


def check_hosts(kind: MemberKind, hosts: Iterable[str]) -> tuple[str, ...]:
    """Refuse hosts that no client could check.

    Raises:
        ConfigError: a server without hosts, a client with hosts, a malformed host.
    """
    found = tuple(host.lower() for host in hosts)
    if bool(found) != (kind is MemberKind.SERVER):
        need = "needs at least one host name or address" if not found else "takes no hosts"
        raise ConfigError(f"a {kind} certificate {need}")
    for host in found:
        try:
            ipaddress.ip_address(host)
        except ValueError:
            # Without dots and letters it would be a mistyped address.
            if not _DNS.fullmatch(host) or re.fullmatch(r"[0-9.]+", host):
                raise ConfigError(
                    f"host {host!r} is neither a DNS name nor an IP address (no port, no scheme)"
                ) from None
    return found


def days_left(certificate: x509.Certificate, now: datetime | None = None) -> float:
    """Days until the certificate ends; negative when it has ended."""
    remaining = certificate.not_valid_after_utc - (now or datetime.now(UTC))
    return remaining / timedelta(days=1)


def expiry_warning(
    certificate: x509.Certificate, what: str, now: datetime | None = None
) -> str | None:
    """A sentence when less than `WARN_DAYS` are left, else None."""
    days = days_left(certificate, now)
    if days >= WARN_DAYS:
        return None
    date = certificate.not_valid_after_utc.date().isoformat()
    how = f"expires in {max(0, int(days))} days" if days >= 0 else "has expired"
    return f"{what} {how} ({date}); run `cutlayer provision renew` and have it approved"


def load_certificates(path: Path) -> list[x509.Certificate]:
    """Every certificate of a PEM file.

    Raises:
        StorageError: missing, unreadable or without a certificate.
    """
    with explain_os_errors(f"read certificate {path}"):
        data = path.read_bytes()
    try:
        return x509.load_pem_x509_certificates(data)
    except MALFORMED as error:
        text = f"{path} is not a certificate in PEM form; install the kit again"
        raise StorageError(text) from error


def parse_certificate(pem: bytes, where: str) -> x509.Certificate:
    """One certificate.

    Raises:
        StorageError: it is not one.
    """
    try:
        return x509.load_pem_x509_certificate(pem)
    except MALFORMED as error:
        raise StorageError(f"{where} is not a certificate in PEM form") from error


def _key_sha256(certificate: x509.Certificate) -> bytes:
    try:
        data = certificate.public_key().public_bytes(
            Encoding.DER, PublicFormat.SubjectPublicKeyInfo
        )
    except MALFORMED as error:
        raise PermissionRefused("the certificate's key is of a kind that is not known") from error
    return hashlib.sha256(data).digest()


def _usage(
    *, digital_signature: bool = False, key_cert_sign: bool = False, crl_sign: bool = False
) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=digital_signature,
        key_cert_sign=key_cert_sign,
        crl_sign=crl_sign,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )
