"""Signatures by a member's certificate key, and their check by other members.

It does not know what is signed. Both sides put the same label before the data, so that a signature
made here means nothing elsewhere, such as in a TLS handshake.
"""

from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric import ec, padding
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding

from cutlayer.errors import ConfigError, PermissionRefused
from cutlayer.identity.certificates import (
    CLOCK_SKEW,
    MALFORMED,
    Role,
    identify,
    load_certificates,
)
from cutlayer.identity.keys import PublicKey, check_key, load_key
from cutlayer.identity.revocation import RevocationList

__all__ = ["CertificateVerifier", "KitSigner"]

_LABEL = b"cutlayer member signature v1\0"
_PSS = padding.PSS(mgf=padding.MGF1(SHA256()), salt_length=padding.PSS.DIGEST_LENGTH)
_MAX_CERTIFICATE_BYTES = 16 << 10


class KitSigner:
    """Signs with the key of an installed kit: ECDSA or RSA-PSS, with SHA-256."""

    def __init__(self, certificate: Path, key: Path) -> None:
        """Read both files.

        Args:
            certificate: PEM; the member's own comes first.
            key: its private key, PEM, not encrypted, mode 0600.

        Raises:
            StorageError: a file cannot be read.
            ConfigError: the key is not the certificate's.
        """
        own, self._key = load_certificates(certificate)[0], load_key(key)
        if own.public_key() != self._key.public_key():
            raise ConfigError(f"{key} is not the private key of {certificate}")
        self._certificate = own.public_bytes(Encoding.DER)

    @property
    def certificate(self) -> bytes:
        """The member's certificate, DER."""
        return self._certificate

    def sign(self, data: bytes) -> bytes:
        """Sign `data` under the label of member signatures."""
        if isinstance(self._key, ec.EllipticCurvePrivateKey):
            return self._key.sign(_LABEL + data, ec.ECDSA(SHA256()))
        return self._key.sign(_LABEL + data, _PSS, SHA256())


class CertificateVerifier:
    """Accepts signatures of members that the federation's authority certified for training."""

    def __init__(
        self,
        authority: Path,
        revoked: Path | None = None,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        """Read the authority's certificates.

        Args:
            authority: PEM.
            revoked: the signed revocation list; a newer file counts at the next check. None checks
                no revocation.
            now: the clock, timezone-aware.

        Raises:
            StorageError: a file cannot be read, or the list is not the authority's.
        """
        self._authorities, self._now = load_certificates(authority), now
        self._revoked = None if revoked is None else RevocationList(revoked, authority)

    def verify(self, member: str, certificate: bytes, data: bytes, signature: bytes) -> None:
        """Check that `member` signed `data` with the key of this certificate.

        Args:
            member: the name that the certificate must carry.
            certificate: DER, from a peer.
            data: what was signed.
            signature: from a peer.

        Raises:
            PermissionRefused: the signature is wrong, or the certificate is not this member's, not
                the authority's, not for training, expired or revoked.
        """
        found = self._accepted(member, certificate)
        try:
            key = check_key(found.public_key(), "the certificate")
            _check_signature(key, data, signature)
        except (InvalidSignature, ConfigError, *MALFORMED) as error:
            raise PermissionRefused(
                f"the signature is not {member}'s: its message was forged or changed on the way"
            ) from error

    def _accepted(self, member: str, certificate: bytes) -> x509.Certificate:
        found = _parse(member, certificate)
        if not any(_is_issued_by(found, authority) for authority in self._authorities):
            raise PermissionRefused(
                f"the certificate of {member} was not issued by this federation's authority"
            )
        holder = identify(found.public_bytes(Encoding.PEM), member)
        if holder.name != member:
            raise PermissionRefused(f"{member} showed the certificate of {holder.name}")
        if Role.TRAIN not in holder.roles:
            raise PermissionRefused(f"the certificate of {member} lacks the role {Role.TRAIN}")
        self._check_time(member, found)
        return found

    def _check_time(self, member: str, found: x509.Certificate) -> None:
        now = self._now()
        if not found.not_valid_before_utc - CLOCK_SKEW <= now <= found.not_valid_after_utc:
            raise PermissionRefused(
                f"the certificate of {member} is not valid at this time ({now.date()}); it must "
                "renew it, or this machine's clock is wrong"
            )
        if self._revoked is not None and self._revoked.is_revoked(found.serial_number):
            raise PermissionRefused(f"the certificate of {member} is revoked")


def _parse(member: str, certificate: bytes) -> x509.Certificate:
    if len(certificate) > _MAX_CERTIFICATE_BYTES:
        raise PermissionRefused(f"{member} showed a certificate that is too large to be one")
    try:
        return x509.load_der_x509_certificate(certificate)
    except MALFORMED as error:
        raise PermissionRefused(f"{member} showed something that is no certificate") from error


def _is_issued_by(certificate: x509.Certificate, authority: x509.Certificate) -> bool:
    try:
        certificate.verify_directly_issued_by(authority)
        return authority.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    except (InvalidSignature, *MALFORMED):
        return False


def _check_signature(key: PublicKey, data: bytes, signature: bytes) -> None:
    if isinstance(key, ec.EllipticCurvePublicKey):
        key.verify(signature, _LABEL + data, ec.ECDSA(SHA256()))
    else:
        key.verify(signature, _LABEL + data, _PSS, SHA256())
