"""RA-TLS: a self-signed certificate that carries evidence for its own key.

It opens no connection (`wire`) and does not say who operates the place (`endorsement`). The
evidence within binds the TLS key alone: a nonce comes later, in HELLO. Accelerators' evidence is
too large for a certificate and comes with that nonce too.

Source: TCG DICE Attestation Architecture 1.1, section 6 (OID 2.23.133.5.4.9), and the CCC's
Interoperable RA-TLS (CBOR tag 60000: evidence with collateral).
"""

import hashlib
from dataclasses import dataclass
from datetime import datetime, timedelta

import cbor2
import msgspec
from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from cutlayer.errors import ConfigError
from cutlayer.identity.certificates import CLOCK_SKEW, MALFORMED
from cutlayer.tee.assurance import Assurance
from cutlayer.tee.binding import Binding
from cutlayer.tee.evidence import Evidence
from cutlayer.tee.exhibit import pack_evidence, unpack_evidence
from cutlayer.tee.policy import Policy
from cutlayer.tee.refusal import Refusal, refused
from cutlayer.tee.verify import AttestationResult, verify

__all__ = [
    "ATTESTED_NAME",
    "LIFETIME",
    "AttestedCertificate",
    "has_evidence",
    "key_digest",
    "key_pem",
    "make_certificate",
    "verify_certificate",
]

LIFETIME = timedelta(hours=24)
ATTESTED_NAME = "attested.cutlayer.invalid"
"""The name in every such certificate: it is the only root of its connection, so it says nothing."""
_EVIDENCE_OID = x509.ObjectIdentifier("2.23.133.5.4.9")
_TAG = 60000
_MAX_EVIDENCE_BYTES = 64 << 10
"""TLS libraries take about 100 KB of certificates."""
_MAX_CERTIFICATE_BYTES = 128 << 10


@dataclass(frozen=True, kw_only=True)
class AttestedCertificate:
    """A peer's, whose evidence was accepted."""

    pem: bytes
    key_sha256: bytes
    """Of its public key; what later evidence must bind."""
    result: AttestationResult


def key_digest(key: ec.EllipticCurvePublicKey) -> bytes:
    """SHA-256 of the DER SubjectPublicKeyInfo."""
    data = key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    return hashlib.sha256(data).digest()


def key_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    """For the TLS library alone; never for a file."""
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def make_certificate(
    key: ec.EllipticCurvePrivateKey,
    evidence: Evidence,
    at: datetime,
    extensions: tuple[x509.UnrecognizedExtension, ...] = (),
) -> bytes:
    """A certificate of 24 hours, PEM.

    Args:
        key: of the door.
        evidence: that binds this key, an empty nonce and no spec.
        at: now, UTC.
        extensions: more to carry, not critical.

    Raises:
        ConfigError: the evidence does not fit.
    """
    packed = pack_evidence(msgspec.structs.replace(evidence, companions=[]))
    if len(packed) > _MAX_EVIDENCE_BYTES:
        raise ConfigError(
            f"evidence of {len(packed)} bytes does not fit a certificate ({_MAX_EVIDENCE_BYTES}); "
            "have the attester leave collateral out that the verifiers have"
        )
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, ATTESTED_NAME)])
    usage = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH])
    builder = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(at - CLOCK_SKEW)
        .not_valid_after(at - CLOCK_SKEW + LIFETIME)
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(ATTESTED_NAME)]), critical=False)
        .add_extension(usage, critical=False)
        .add_extension(x509.UnrecognizedExtension(_EVIDENCE_OID, _wrap(packed)), critical=False)
    )
    for extension in extensions:
        builder = builder.add_extension(extension, critical=False)
    return builder.sign(key, SHA256()).public_bytes(Encoding.PEM)


def has_evidence(der: bytes) -> bool:
    """Whether a certificate claims to be attested; whether it is says `verify_certificate`."""
    try:
        x509.load_der_x509_certificate(der).extensions.get_extension_for_oid(_EVIDENCE_OID)
    except MALFORMED:
        return False
    return True


def verify_certificate(der: bytes, policy: Policy, at: datetime) -> AttestedCertificate:
    """Judge the certificate that a server shows, before anything is sent to it.

    Args:
        der: as the TLS handshake gave it.
        policy: the owner's.
        at: time of the verdict, UTC.

    Raises:
        AttestationError: it is not attested as the policy wants; `refusal` names the reason.
        ConfigError: a root of the policy cannot be read.
    """
    certificate = _parse(der)
    _check_dates(certificate, at)
    key = certificate.public_key()
    if not isinstance(key, ec.EllipticCurvePublicKey):
        raise refused(Refusal.MALFORMED, "the server's TLS key is not an elliptic curve's")
    digest = key_digest(key)
    binding = Binding(tls_key_sha256=digest, nonce=b"", spec_digest=b"")
    result = verify(_evidence_in(certificate), _at_the_door(policy), at, binding.report_data())
    return AttestedCertificate(
        pem=certificate.public_bytes(Encoding.PEM), key_sha256=digest, result=result
    )


def _wrap(packed: bytes) -> bytes:
    return cbor2.dumps(cbor2.CBORTag(_TAG, packed))


def _unwrap(value: bytes) -> bytes:
    # One byte string under one tag has one shortest form: compare it, and feed no parser.
    for num_length_bytes in (1, 2, 3, 5):
        packed = value[3 + num_length_bytes :]
        if _wrap(packed) == value:
            return packed
    raise refused(Refusal.MALFORMED, "the certificate's evidence is not under CBOR tag 60000")


def _parse(der: bytes) -> x509.Certificate:
    if len(der) > _MAX_CERTIFICATE_BYTES:
        raise refused(Refusal.MALFORMED, f"the server's certificate has {len(der)} bytes")
    try:
        certificate = x509.load_der_x509_certificate(der)
        certificate.verify_directly_issued_by(certificate)
    except InvalidSignature as error:
        raise refused(Refusal.BAD_SIGNATURE, "the certificate is not signed by its key") from error
    except MALFORMED as error:
        # Issued by somebody else, as a provisioned certificate is, or no certificate.
        raise refused(
            Refusal.NO_EVIDENCE, "the server shows no attested certificate; has it a [tee] section?"
        ) from error
    return certificate


def _evidence_in(certificate: x509.Certificate) -> Evidence:
    try:
        extension = certificate.extensions.get_extension_for_oid(_EVIDENCE_OID).value
    except MALFORMED as error:
        raise refused(
            Refusal.NO_EVIDENCE, "the server's certificate carries no evidence of what it runs"
        ) from error
    assert isinstance(extension, x509.UnrecognizedExtension)
    return unpack_evidence(_unwrap(extension.value))


def _check_dates(certificate: x509.Certificate, at: datetime) -> None:
    begin, end = certificate.not_valid_before_utc, certificate.not_valid_after_utc
    if at < begin - CLOCK_SKEW:
        raise refused(
            Refusal.NOT_YET_VALID,
            f"the server's certificate begins {begin:%Y-%m-%d %H:%M:%S} UTC, here it is "
            f"{at:%Y-%m-%d %H:%M:%S}: is a clock wrong?",
        )
    if at > end:
        raise refused(
            Refusal.EXPIRED,
            f"the server's certificate ended {end:%Y-%m-%d %H:%M:%S} UTC, here it is "
            f"{at:%Y-%m-%d %H:%M:%S}: does its attester fail, or is a clock wrong?",
        )
    if end - begin > LIFETIME:
        raise refused(Refusal.STALE, f"the certificate lives {end - begin}, at most {LIFETIME}")


def _at_the_door(policy: Policy) -> Policy:
    """The same, for evidence as old as a certificate may be and without accelerators.

    What is relaxed here is asked for in full with the nonce, before any tensor.
    """
    least = min(policy.least, Assurance.HARDWARE_TEE).label.lower()
    changes = {"max_age_s": LIFETIME.total_seconds(), "gpus": 0, "least_assurance": least}
    return policy.model_copy(update=changes)
