"""Certificate chains of tests: any depth, any flag wrong, RSA-PSS as AMD signs, EC as AWS does."""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import NameOID

AT = datetime(2026, 11, 21, 12, tzinfo=UTC)
"""The frozen time of the tests."""
PSS = padding.PSS(mgf=padding.MGF1(hashes.SHA384()), salt_length=48)

Key = rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey


@dataclass(frozen=True, kw_only=True)
class Wish:
    """How a certificate is made; the defaults make a good authority."""

    is_authority: bool = True
    has_constraints: bool = True
    path_length: int | None = None
    may_sign: bool = True
    begin: datetime = AT - timedelta(days=30)
    end: datetime = AT + timedelta(days=30)
    serial: int | None = None
    extensions: Mapping[str, bytes] | None = None
    """Unknown ones, by OID."""
    is_critical: bool = False
    """Those."""


@dataclass(frozen=True, kw_only=True)
class Authority:
    """A certificate with its key."""

    certificate: x509.Certificate
    key: Key

    @property
    def der(self) -> bytes:
        return self.certificate.public_bytes(Encoding.DER)

    @property
    def pem(self) -> bytes:
        return self.certificate.public_bytes(Encoding.PEM)


def rsa_key() -> rsa.RSAPrivateKey:
    return rsa.generate_private_key(65537, 2048)


def ec_key() -> ec.EllipticCurvePrivateKey:
    return ec.generate_private_key(ec.SECP384R1())


def issue(
    name: str, key: Key, issuer: Authority | None = None, wish: Wish | None = None
) -> Authority:
    """A certificate for `key`, self-signed without an issuer."""
    wish = wish or Wish()
    signer = issuer.key if issuer else key
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer.certificate.subject if issuer else subject)
        .public_key(key.public_key())
        .serial_number(wish.serial or x509.random_serial_number())
        .not_valid_before(wish.begin)
        .not_valid_after(wish.end)
    )
    for extension, is_critical in _extensions(wish):
        builder = builder.add_extension(extension, is_critical)
    rsa_padding = PSS if isinstance(signer, rsa.RSAPrivateKey) else None
    certificate = builder.sign(signer, hashes.SHA384(), rsa_padding=rsa_padding)
    return Authority(certificate=certificate, key=key)


def revocation_list(
    issuer: Authority, serials: list[int], begin: datetime = AT - timedelta(days=1)
) -> bytes:
    """DER of a list that is good for a week."""
    builder = (
        x509.CertificateRevocationListBuilder()
        .issuer_name(issuer.certificate.subject)
        .last_update(begin)
        .next_update(begin + timedelta(days=7))
    )
    for serial in serials:
        entry = x509.RevokedCertificateBuilder().serial_number(serial).revocation_date(begin)
        builder = builder.add_revoked_certificate(entry.build())
    rsa_padding = PSS if isinstance(issuer.key, rsa.RSAPrivateKey) else None
    signed = builder.sign(issuer.key, hashes.SHA384(), rsa_padding=rsa_padding)
    return signed.public_bytes(Encoding.DER)


def _extensions(wish: Wish) -> list[tuple[x509.ExtensionType, bool]]:
    found: list[tuple[x509.ExtensionType, bool]] = []
    if wish.has_constraints:
        length = wish.path_length if wish.is_authority else None
        found.append((x509.BasicConstraints(ca=wish.is_authority, path_length=length), True))
    usage = x509.KeyUsage(
        digital_signature=True,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=wish.is_authority and wish.may_sign,
        crl_sign=wish.is_authority,
        encipher_only=False,
        decipher_only=False,
    )
    found.append((usage, True))
    for oid, value in (wish.extensions or {}).items():
        unknown = x509.UnrecognizedExtension(x509.ObjectIdentifier(oid), value)
        found.append((unknown, wish.is_critical))
    return found
