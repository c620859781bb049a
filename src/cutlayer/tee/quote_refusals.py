"""Names for what `dcap-qvl` refuses in prose, and a look at the chains for what it only calls bad.

It accepts nothing: the verdict has fallen, this says why. A wrong name here opens no door.
"""

from collections.abc import Iterator
from datetime import datetime

import msgspec
from cryptography import x509

from cutlayer.errors import AttestationError
from cutlayer.tee.certificate_chain import (
    check_chain,
    load_certificates,
    load_revocation_list,
    root_fingerprints,
)
from cutlayer.tee.refusal import Refusal, refused

__all__ = ["refusal_of"]

# Of the certificate "Intel SGX Root CA", which is valid until 2049.
_INTEL_ROOT = "44a0196b2b99f889b8e149e95b807a350e7424964399e885a7cbb8ccfab674d3"

_BY_PHRASE = (
    ("issue date is in the future", Refusal.NOT_YET_VALID),
    ("NotValidYet", Refusal.NOT_YET_VALID),
    ("TCB status is invalid", Refusal.TCB),
    ("expired", Refusal.EXPIRED),
    ("Expired", Refusal.EXPIRED),
    ("Revoked", Refusal.REVOKED),
    ("Debug mode is enabled", Refusal.DEBUG),
    ("Invalid MR service TD", Refusal.WRONG_MEASUREMENT),
    ("SEPT_VE_DISABLE", Refusal.WRONG_MEASUREMENT),
    ("No matching TCB level", Refusal.TCB),
    ("TCB levels", Refusal.TCB),
    ("is below minimum", Refusal.TCB),
    ("TDX module", Refusal.TCB),
    ("Fmspc mismatch", Refusal.TCB),
    ("QE MRSIGNER", Refusal.TCB),
    ("QE ISV", Refusal.TCB),
    ("QE MISCSELECT", Refusal.TCB),
    ("QE ATTRIBUTES", Refusal.TCB),
    ("QE report validation", Refusal.TCB),
    ("Unknown QE vendor", Refusal.TCB),
    ("non-TDX TCB info", Refusal.OTHER_PLATFORM),
    ("non-SGX TCB info", Refusal.OTHER_PLATFORM),
    ("Unsupported QE Identity", Refusal.OTHER_PLATFORM),
    ("QE report hash mismatch", Refusal.BAD_SIGNATURE),
    ("signature is invalid", Refusal.BAD_SIGNATURE),
    ("Signature is invalid", Refusal.BAD_SIGNATURE),
)
"""The first that occurs counts; what holds none of them is a format that no parser accepts."""

_HINTS = {
    Refusal.EXPIRED: "the collateral has run out, fetch it again: ",
    Refusal.NOT_YET_VALID: "the collateral is of the future, is a clock wrong?: ",
    Refusal.TCB: "this firmware or quoting enclave is on none of Intel's lists: ",
}
_OF_CHAINS = ("certificate", "certs", "CRL", "Issuer")
_NO_FIT = "certificates, revocation lists and their signatures do not fit together"


def refusal_of(
    prose: str, chain_pem: bytes, collateral_json: str, root_pem: bytes | None, at: datetime
) -> AttestationError:
    """The error to raise for one of the vendor's verifier.

    Args:
        prose: what it said.
        chain_pem: of the quoting key, from the quote.
        collateral_json: dcap-qvl's QuoteCollateralV3.
        root_pem: what replaced Intel's root.
        at: time of the verdict.
    """
    text = prose.removeprefix("Verification failed: ")
    for phrase, reason in _BY_PHRASE:
        if phrase in text:
            return refused(reason, f"{_HINTS.get(reason, '')}{text}")
    if any(phrase in text for phrase in _OF_CHAINS):
        return _of_chains(chain_pem, collateral_json, root_pem, at) or refused(
            Refusal.BAD_CHAIN, f"{_NO_FIT} ({text})"
        )
    return refused(Refusal.MALFORMED, text)


class _Collateral(msgspec.Struct):
    """What we read again of QuoteCollateralV3."""

    root_ca_crl: str
    pck_crl: str
    tcb_info_issuer_chain: str
    qe_identity_issuer_chain: str
    pck_certificate_chain: str | None = None

    def chains(self, pck_pem: bytes) -> Iterator[tuple[str, bytes, list[str]]]:
        """Name, PEM and the revocation lists that speak of it."""
        pem = (self.pck_certificate_chain or "").encode() or pck_pem
        yield "the quoting key's chain", pem, [self.root_ca_crl, self.pck_crl]
        yield "the TCB info's chain", self.tcb_info_issuer_chain.encode(), [self.root_ca_crl]
        yield "the identity's chain", self.qe_identity_issuer_chain.encode(), [self.root_ca_crl]


def _of_chains(
    chain_pem: bytes, collateral_json: str, root_pem: bytes | None, at: datetime
) -> AttestationError | None:
    try:
        roots = {_INTEL_ROOT} if root_pem is None else root_fingerprints(root_pem)
        collateral = msgspec.json.decode(collateral_json, type=_Collateral)
        for what, pem, lists in collateral.chains(chain_pem):
            certificates = load_certificates(pem, what)
            revoked = [_revocation_list(text) for text in lists]
            check_chain(certificates, at=at, roots=roots, what=what, revocation_lists=revoked)
    except AttestationError as error:
        return error
    except (msgspec.DecodeError, ValueError, RecursionError) as error:
        return refused(Refusal.MALFORMED, f"collateral cannot be read: {error}")
    return None


def _revocation_list(text: str) -> x509.CertificateRevocationList:
    return load_revocation_list(bytes.fromhex(text), "a revocation list of the collateral")
