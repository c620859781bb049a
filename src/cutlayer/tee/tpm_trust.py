"""Which attestation keys of TPMs are believed: certified up to a named root, or activated before.

The policy's file `roots.tpm` holds both kinds in PEM: certificates of makers' roots, and public
keys of attestation keys that passed `tpm_activation`. No root is built in: a TPM's word is worth
what its maker's, cloud's or owner's word is. It judges no quote.
"""

import re
from datetime import datetime

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    PublicFormat,
    load_pem_public_key,
)

from cutlayer.tee.certificate_chain import (
    check_chain,
    issuer_key,
    load_certificates,
    load_revocation_list,
    root_fingerprints,
)
from cutlayer.tee.refusal import Refusal, refused
from cutlayer.tee.tpm_attest import TpmKey
from cutlayer.tee.tpm_keys import key_digest

__all__ = [
    "ATTESTATION_USAGE",
    "ENDORSEMENT_USAGE",
    "check_key_certificate",
    "key_pem",
    "pinned_keys",
]

ENDORSEMENT_USAGE = x509.ObjectIdentifier("2.23.133.8.1")
ATTESTATION_USAGE = x509.ObjectIdentifier("2.23.133.8.3")
"""Extended key usages of TCG's credential profiles."""

_KEY_BLOCK = re.compile(rb"-----BEGIN PUBLIC KEY-----.+?-----END PUBLIC KEY-----", re.DOTALL)
_CERTIFICATE_LABEL = b"-----BEGIN CERTIFICATE-----"


def key_pem(key: TpmKey) -> bytes:
    """An attestation key as a block for the policy's file `roots.tpm`."""
    return key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)


def pinned_keys(roots: bytes) -> frozenset[str]:
    """Digests (`tpm_keys.key_digest`) of the keys in a policy's file.

    Raises:
        AttestationError: a block is no RSA or EC key.
    """
    return frozenset(key_digest(_load_key(block)) for block in _KEY_BLOCK.findall(roots))


def _load_key(block: bytes) -> TpmKey:
    try:
        key = load_pem_public_key(block)
    except (ValueError, UnsupportedAlgorithm) as error:
        raise refused(Refusal.MALFORMED, f"a key of the policy's TPM roots: {error}") from error
    if not isinstance(key, rsa.RSAPublicKey | ec.EllipticCurvePublicKey):
        raise refused(Refusal.MALFORMED, "a key of the policy's TPM roots is neither RSA nor EC")
    return key


def check_key_certificate(
    key: TpmKey,
    chain_pem: bytes,
    roots: bytes,
    at: datetime,
    usage: x509.ObjectIdentifier,
    revocation_list: bytes | None = None,
) -> x509.Certificate:
    """Refuse a TPM's key that no named root certifies.

    Args:
        key: an attestation key, or an endorsement key.
        chain_pem: its certificate first, the root last.
        roots: PEM of the policy; keys in it are passed over.
        at: time of the verdict.
        usage: `ATTESTATION_USAGE` or `ENDORSEMENT_USAGE`.
        revocation_list: of an authority in the chain.

    Raises:
        AttestationError: bad-chain, wrong-root, expired, not-yet-valid, revoked or malformed.
    """
    if _CERTIFICATE_LABEL not in roots:
        raise refused(Refusal.WRONG_ROOT, "the policy's `roots.tpm` names no certificate")
    chain = load_certificates(chain_pem, "the TPM key's certificate")
    lists = [load_revocation_list(revocation_list, "crl")] if revocation_list is not None else []
    known = root_fingerprints(roots)
    check_chain(chain, at=at, roots=known, what="the TPM's chain", revocation_lists=lists)
    certified = issuer_key(chain[0])
    if certified != key:
        raise refused(Refusal.BAD_CHAIN, "the certificate is of another key than the TPM's")
    _check_usage(chain[0], usage)
    return chain[0]


def _check_usage(certificate: x509.Certificate, usage: x509.ObjectIdentifier) -> None:
    # A company's root signs servers' certificates too; some clouds state no usage at all.
    try:
        stated = certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    except x509.ExtensionNotFound:
        return
    if usage not in stated:
        raise refused(Refusal.BAD_CHAIN, "the certificate is not for this use of a TPM's key")
