"""Does an X.509 chain lead to a root that is known, at a given time?

It reads no clock, fetches nothing and knows no vendor: roots, time and revocation lists are
handed in. Host names and extended key usages are not its business (nobody is connected to).
"""

from collections.abc import Collection, Sequence
from datetime import UTC, datetime

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.utils import CryptographyDeprecationWarning
from cryptography.x509.oid import ExtensionOID

from cutlayer.tee.refusal import Refusal, refused

__all__ = [
    "IssuerKey",
    "check_chain",
    "check_dates",
    "check_revocation",
    "fingerprint",
    "issuer_key",
    "load_certificates",
    "load_revocation_list",
    "root_fingerprints",
]

IssuerKey = rsa.RSAPublicKey | ec.EllipticCurvePublicKey
"""What the vendors' authorities sign with."""

_MAX_CERTIFICATES = 16
_MAX_NAME = 120
_HANDLED_CRITICAL = {
    ExtensionOID.BASIC_CONSTRAINTS,
    ExtensionOID.KEY_USAGE,
    ExtensionOID.EXTENDED_KEY_USAGE,
    # A TPM's key has its maker's name there and an empty subject.
    ExtensionOID.SUBJECT_ALTERNATIVE_NAME,
}
_WEAK = (hashes.MD5, hashes.SHA1)
_PEM_LABEL = b"-----BEGIN CERTIFICATE-----"
# What the parser of a broken certificate raises, at loading or later at an extension's first look
# (the warning where the caller made warnings errors: it foretells a refusal).
_UNREADABLE = (
    ValueError,
    TypeError,
    UnsupportedAlgorithm,
    CryptographyDeprecationWarning,
    x509.DuplicateExtension,
    x509.InvalidVersion,
    x509.UnsupportedGeneralNameType,
)


def load_certificates(data: bytes, what: str) -> list[x509.Certificate]:
    """Certificates from PEM (one or more) or DER (one).

    Args:
        data: PEM or DER.
        what: its name, for the message.

    Raises:
        AttestationError: malformed, or more than any vendor's chain holds.
    """
    try:
        if data.count(_PEM_LABEL) > _MAX_CERTIFICATES:
            raise refused(Refusal.MALFORMED, f"{what}: more than {_MAX_CERTIFICATES} certificates")
        if _PEM_LABEL in data:
            return x509.load_pem_x509_certificates(data)
        return [x509.load_der_x509_certificate(data)]
    except _UNREADABLE as error:
        raise refused(Refusal.MALFORMED, f"{what} is no certificate: {error}") from error


def load_revocation_list(data: bytes, what: str) -> x509.CertificateRevocationList:
    """A revocation list from PEM or DER.

    Raises:
        AttestationError: malformed.
    """
    try:
        if data.lstrip().startswith(b"-----BEGIN"):
            return x509.load_pem_x509_crl(data)
        return x509.load_der_x509_crl(data)
    except _UNREADABLE as error:
        raise refused(Refusal.MALFORMED, f"{what} is no revocation list: {error}") from error


def fingerprint(certificate: x509.Certificate) -> str:
    """SHA-256 of the DER, lower-case hex."""
    return certificate.fingerprint(hashes.SHA256()).hex()


def root_fingerprints(pem: bytes) -> frozenset[str]:
    """Of the roots that a policy names instead of a vendor's.

    Raises:
        AttestationError: the file holds no certificate.
    """
    return frozenset(fingerprint(root) for root in load_certificates(pem, "the policy's root"))


def check_chain(
    chain: Sequence[x509.Certificate],
    *,
    at: datetime,
    roots: Collection[str],
    what: str,
    revocation_lists: Sequence[x509.CertificateRevocationList] = (),
    num_below: int = 0,
) -> None:
    """Refuse a chain that does not lead from its first certificate to a known root.

    Args:
        chain: end entity first, root last (the root itself must be there).
        at: time of the verdict, UTC with time zone.
        roots: SHA-256 fingerprints (hex) of the roots that are believed.
        what: whose chain, for the message.
        revocation_lists: each signed by a certificate of the chain; those it names are refused.
        num_below: certificates under the first one, which the caller checks.

    Raises:
        AttestationError: bad-chain, wrong-root, expired, not-yet-valid or revoked.
    """
    if not chain or len(chain) > _MAX_CERTIFICATES:
        raise refused(Refusal.BAD_CHAIN, f"{what}: {len(chain)} certificates are no chain")
    try:
        _check_links(chain, what, num_below)
        if fingerprint(chain[-1]) not in roots:
            name = _name(chain[-1])
            raise refused(Refusal.WRONG_ROOT, f"{what} ends at {name}, which is not a known root")
        for certificate in chain:
            check_dates(
                certificate.not_valid_before_utc,
                certificate.not_valid_after_utc,
                at,
                f"{what}: certificate {_name(certificate)}",
            )
        for revocation_list in revocation_lists:
            serials = [c.serial_number for c in chain if c.issuer == revocation_list.issuer]
            check_revocation(revocation_list, chain, serials, at, what)
    except _UNREADABLE as error:
        raise refused(Refusal.BAD_CHAIN, f"{what} cannot be read: {error}") from error


def check_dates(begin: datetime, end: datetime | None, at: datetime, what: str) -> None:
    """Refuse what is not valid at a time.

    Raises:
        AttestationError: expired or not-yet-valid.
    """
    if at < begin:
        raise refused(
            Refusal.NOT_YET_VALID, f"{what} begins {_stamp(begin)}; the verdict is for {_stamp(at)}"
        )
    if end is not None and at > end:
        raise refused(
            Refusal.EXPIRED, f"{what} ended {_stamp(end)}; the verdict is for {_stamp(at)}"
        )


def check_revocation(
    revocation_list: x509.CertificateRevocationList,
    issuers: Sequence[x509.Certificate],
    serials: Sequence[int],
    at: datetime,
    what: str,
) -> None:
    """Refuse what a list names, and a list that is old or nobody's.

    Args:
        revocation_list: the vendor's.
        issuers: certificates of which one must have signed it.
        serials: of certificates that this list could name: all whose issuer is the list's.
        at: time of the verdict.
        what: whose chain, for the message.

    Raises:
        AttestationError: bad-chain, expired, not-yet-valid or revoked.
    """
    issuer = next((c for c in issuers if c.subject == revocation_list.issuer), None)
    if issuer is None or not _signed(revocation_list, issuer):
        raise refused(Refusal.BAD_CHAIN, f"{what}: the revocation list is not by this chain")
    begin, end = revocation_list.last_update_utc, revocation_list.next_update_utc
    check_dates(begin, end, at, f"{what}: the revocation list")
    for serial in serials:
        if revocation_list.get_revoked_certificate_by_serial_number(serial) is not None:
            raise refused(Refusal.REVOKED, f"{what}: serial {serial:x} is on the revocation list")


def issuer_key(certificate: x509.Certificate) -> IssuerKey:
    """The key that signs in its name.

    Raises:
        AttestationError: another kind of key than any vendor's.
    """
    try:
        key = certificate.public_key()
    except _UNREADABLE as error:
        raise refused(Refusal.BAD_CHAIN, f"a certificate's key cannot be read: {error}") from error
    return _signing_key(key)


def _signing_key(key: object) -> IssuerKey:
    if not isinstance(key, rsa.RSAPublicKey | ec.EllipticCurvePublicKey):
        raise refused(Refusal.BAD_CHAIN, "a certificate's key is neither RSA nor EC")
    return key


def _check_links(chain: Sequence[x509.Certificate], what: str, num_below: int) -> None:
    links = zip(chain, [*chain[1:], chain[-1]], strict=True)
    for depth, (child, parent) in enumerate(links, start=num_below):
        name = _name(child)
        if not _issued(child, parent):
            raise refused(Refusal.BAD_CHAIN, f"{what}: {name} is not signed by the next one")
        _check_critical(child, f"{what}: {name}")
        if depth:
            # Path length counts the authorities between this one and the end entity.
            _check_authority(child, depth - 1, f"{what}: {name}")


def _issued(child: x509.Certificate, parent: x509.Certificate) -> bool:
    if isinstance(child.signature_hash_algorithm, _WEAK):
        return False
    try:
        child.verify_directly_issued_by(parent)
    except (InvalidSignature, *_UNREADABLE):
        return False
    return True


def _signed(revocation_list: x509.CertificateRevocationList, issuer: x509.Certificate) -> bool:
    if isinstance(revocation_list.signature_hash_algorithm, _WEAK):
        return False
    try:
        return revocation_list.is_signature_valid(issuer_key(issuer))
    except _UNREADABLE:
        return False


def _check_critical(certificate: x509.Certificate, what: str) -> None:
    for extension in certificate.extensions:
        if extension.critical and extension.oid not in _HANDLED_CRITICAL:
            oid = extension.oid.dotted_string
            raise refused(Refusal.BAD_CHAIN, f"{what} has critical extension {oid}, unknown here")


def _check_authority(certificate: x509.Certificate, num_below: int, what: str) -> None:
    try:
        basic = certificate.extensions.get_extension_for_class(x509.BasicConstraints).value
    except x509.ExtensionNotFound:
        raise refused(Refusal.BAD_CHAIN, f"{what} is no authority") from None
    if not basic.ca:
        raise refused(Refusal.BAD_CHAIN, f"{what} is no authority")
    if basic.path_length is not None and basic.path_length < num_below:
        raise refused(Refusal.BAD_CHAIN, f"{what} may not stand {num_below + 1} above the end")
    try:
        usage = certificate.extensions.get_extension_for_class(x509.KeyUsage).value
    except x509.ExtensionNotFound:
        return
    if not usage.key_cert_sign:
        raise refused(Refusal.BAD_CHAIN, f"{what} may not sign certificates")


def _name(certificate: x509.Certificate) -> str:
    # Whoever made the certificate chose it: no line breaks and no pages of it in our logs.
    name = certificate.subject.rfc4514_string().encode("unicode_escape").decode()
    return name if len(name) <= _MAX_NAME else f"{name[:_MAX_NAME]}..."


def _stamp(at: datetime) -> str:
    return f"{at.astimezone(UTC):%Y-%m-%d %H:%M:%S} UTC"
