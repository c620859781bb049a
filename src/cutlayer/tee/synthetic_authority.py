"""A test authority in the shape of Intel's: root, platform CA, a chip's PCK, TCB signer.

Whatever it vouches for is SIMULATED: its root is believed only where a policy names it. Its keys
lie in one private file; it signs no quotes (`synthetic_quoter`).
"""

import secrets
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

import msgspec
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)
from cryptography.x509.oid import NameOID

from cutlayer.errors import ConfigError
from cutlayer.storage.files import read_private, write_atomic
from cutlayer.tee.synthetic_pck import SGX_EXTENSION, pck_extension

__all__ = ["Member", "SyntheticAuthority"]

# Not today's: a fixed past lets tests judge at any time of these years.
_START, _END = datetime(2024, 1, 1, tzinfo=UTC), datetime(2049, 12, 31, tzinfo=UTC)


@dataclass(frozen=True)
class Member:
    """A certificate and its key."""

    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey = field(repr=False)

    @property
    def pem(self) -> bytes:
        """The certificate."""
        return self.certificate.public_bytes(Encoding.PEM)


@dataclass(frozen=True, kw_only=True)
class SyntheticAuthority:
    """Everybody who signs something beneath a quote."""

    root: Member
    platform_ca: Member
    pck: Member
    """Of the simulated chip; certifies its quoting enclave."""
    tcb_signer: Member
    ppid: bytes
    """16 bytes: the simulated chip."""

    @classmethod
    def create(cls) -> "SyntheticAuthority":
        """A fresh authority with a fresh chip."""
        root = _issue("cutlayer SIMULATED root", None, is_ca=True)
        platform_ca = _issue("cutlayer SIMULATED platform CA", root, is_ca=True)
        ppid = secrets.token_bytes(16)
        pck = _issue("cutlayer SIMULATED PCK", platform_ca, extension=pck_extension(ppid))
        signer = _issue("cutlayer SIMULATED TCB signing", root)
        return cls(root=root, platform_ca=platform_ca, pck=pck, tcb_signer=signer, ppid=ppid)

    @property
    def pck_chain_pem(self) -> bytes:
        """Leaf first."""
        return self.pck.pem + self.platform_ca.pem + self.root.pem

    @property
    def tcb_chain_pem(self) -> bytes:
        """Of TCB info and of the quoting enclave's identity."""
        return self.tcb_signer.pem + self.root.pem

    def revocation_list(
        self, issuer: Member, start: datetime, end: datetime, revoked: Member | None = None
    ) -> bytes:
        """A list in DER, valid from `start` to `end`."""
        key_id = x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer.key.public_key())
        builder = (
            x509.CertificateRevocationListBuilder()
            .issuer_name(issuer.certificate.subject)
            .last_update(start)
            .next_update(end)
            .add_extension(x509.CRLNumber(1), critical=False)
            .add_extension(key_id, critical=False)
        )
        if revoked is not None:
            entry = x509.RevokedCertificateBuilder().revocation_date(start)
            entry = entry.serial_number(revoked.certificate.serial_number)
            builder = builder.add_revoked_certificate(entry.build())
        return builder.sign(issuer.key, SHA256()).public_bytes(Encoding.DER)

    def save(self, path: Path) -> None:
        """All keys and certificates in one file of mode 0600.

        Raises:
            StorageError: it cannot be written.
        """
        members = {name: _to_pem(getattr(self, name)) for name in _MEMBERS}
        stored = _Stored(ppid=self.ppid.hex(), members=members)
        write_atomic(path, msgspec.json.encode(stored))

    @classmethod
    def load(cls, path: Path) -> "SyntheticAuthority":
        """The authority of a file.

        Raises:
            StorageError: it cannot be read, or others may read it.
            ConfigError: it is no such file.
        """
        data = read_private(path)
        try:
            stored = msgspec.json.decode(data, type=_Stored)
            members = {name: _from_pem(stored.members[name]) for name in _MEMBERS}
            ppid = bytes.fromhex(stored.ppid)
        except (msgspec.DecodeError, KeyError, ValueError, TypeError) as error:
            raise ConfigError(
                f"{path} holds no simulated authority; delete its folder to make another"
            ) from error
        return cls(ppid=ppid, **members)


_MEMBERS = ("root", "platform_ca", "pck", "tcb_signer")


class _Stored(msgspec.Struct):
    ppid: str
    members: dict[str, str]


def _to_pem(member: Member) -> str:
    key = member.key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    return (key + member.pem).decode()


def _from_pem(text: str) -> Member:
    key = load_pem_private_key(text.encode(), None)
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise ValueError("a key of another kind")
    return Member(x509.load_pem_x509_certificate(text.encode()), key)


def _issue(
    name: str, issuer: Member | None, is_ca: bool = False, extension: bytes | None = None
) -> Member:
    key = ec.generate_private_key(ec.SECP256R1())
    signer = key if issuer is None else issuer.key
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    key_id = x509.SubjectKeyIdentifier.from_public_key(key.public_key())
    issuer_id = x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.public_key())
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject if issuer is None else issuer.certificate.subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(_START)
        .not_valid_after(_END)
        .add_extension(x509.BasicConstraints(is_ca, None), critical=True)
        .add_extension(_usage(is_ca), critical=True)
        .add_extension(key_id, critical=False)
        .add_extension(issuer_id, critical=False)
    )
    if extension is not None:
        unknown = x509.UnrecognizedExtension(SGX_EXTENSION, extension)
        builder = builder.add_extension(unknown, critical=False)
    return Member(builder.sign(signer, SHA256()), key)


def _usage(is_ca: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not is_ca,
        content_commitment=not is_ca,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=is_ca,
        crl_sign=is_ca,
        encipher_only=False,
        decipher_only=False,
    )
