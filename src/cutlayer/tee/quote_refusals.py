"""Names for what `dcap-qvl` refuses in prose, and a look at the chains for what it only calls bad.

It accepts nothing: the verdict has fallen, this says why. A wrong name here opens no door.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from itertools import pairwise

import msgspec
from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from cutlayer.errors import ConfigError
from cutlayer.tee.refusal import Refusal

__all__ = ["ChainFacts", "der_of_root", "refusal_of"]

# Of the certificate "Intel SGX Root CA", which is valid until 2049.
_INTEL_ROOT_KEY_SHA256 = "a0af031289f5d5d4132f9186068a7fc13628633ba235777472e29b6b6c67a49e"

_BY_PHRASE = (
    ("issue date is in the future", Refusal.NOT_YET_VALID),
    ("NotValidYet", Refusal.NOT_YET_VALID),
    ("expired", Refusal.EXPIRED),
    ("Expired", Refusal.EXPIRED),
    ("Revoked", Refusal.REVOKED),
    ("Debug mode is enabled", Refusal.DEBUG),
    ("Invalid MR service TD", Refusal.WRONG_MEASUREMENT),
    ("SEPT_VE_DISABLE", Refusal.WRONG_MEASUREMENT),
    ("No matching TCB level", Refusal.TCB),
    ("TCB levels", Refusal.TCB),
    ("is below minimum", Refusal.TCB),
    ("No TDX module identity", Refusal.TCB),
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

_OF_CHAINS = ("certificate chain", "certs", "certificate", "CRL", "Issuer", "root ca")

_NO_CHAIN_TEXT = "certificates, revocation lists and their signatures do not fit together"
_CHAIN_TEXTS = {
    Refusal.MALFORMED: "a certificate or a revocation list cannot be parsed",
    Refusal.WRONG_ROOT: "its chain ends at another root than the one that is believed",
    Refusal.NOT_YET_VALID: "a certificate or list is of the future; is a clock wrong?",
    Refusal.EXPIRED: "a certificate or list has run out; fetch collateral again",
    Refusal.REVOKED: "a certificate of its chain is on the vendor's revocation list",
}


@dataclass(frozen=True, kw_only=True)
class ChainFacts:
    """The chains and lists behind a refused quote, for a second look."""

    chains: list[list[x509.Certificate]]
    """Leaf first: of the quoting key, of the TCB info, of the quoting enclave's identity."""
    lists: list[x509.CertificateRevocationList]
    is_readable: bool
    """False: a certificate or a list cannot be parsed."""
    root_key_sha256: str
    at: datetime

    @classmethod
    def read(
        cls, chain_pem: bytes, collateral_json: str, root_der: bytes | None, at: datetime
    ) -> "ChainFacts":
        """Whatever can be parsed of them; never an error."""
        try:
            collateral = msgspec.json.decode(collateral_json, type=_Collateral)
            pck_pem = (collateral.pck_certificate_chain or "").encode() or chain_pem
            pems = [pck_pem, *(pem.encode() for pem in collateral.issuer_chains)]
            chains = [x509.load_pem_x509_certificates(pem) for pem in pems]
            lists = [
                x509.load_der_x509_crl(bytes.fromhex(text))
                for text in (collateral.root_ca_crl, collateral.pck_crl)
            ]
        except (ValueError, msgspec.DecodeError, RecursionError):
            chains, lists, is_readable = [], [], False
        else:
            is_readable = True
        root_key = _INTEL_ROOT_KEY_SHA256
        if root_der is not None:
            root_key = _key_sha256(x509.load_der_x509_certificate(root_der))
        return cls(
            chains=chains, lists=lists, is_readable=is_readable, root_key_sha256=root_key, at=at
        )

    def reason(self) -> Refusal:
        """The first thing that is wrong with the chains, in the order of what explains most."""
        if not self.is_readable:
            return Refusal.MALFORMED
        if any(_is_broken(chain) for chain in self.chains):
            return Refusal.BAD_CHAIN
        if any(_key_sha256(chain[-1]) != self.root_key_sha256 for chain in self.chains):
            return Refusal.WRONG_ROOT
        return self._reason_of_dates() or self._reason_of_lists() or Refusal.BAD_CHAIN

    def _reason_of_dates(self) -> Refusal | None:
        for start, end in self._validities():
            if self.at < start:
                return Refusal.NOT_YET_VALID
            if end is not None and self.at > end:
                return Refusal.EXPIRED
        return None

    def _validities(self) -> Iterator[tuple[datetime, datetime | None]]:
        for chain in self.chains:
            for certificate in chain:
                yield certificate.not_valid_before_utc, certificate.not_valid_after_utc
        for revoked in self.lists:
            yield revoked.last_update_utc, revoked.next_update_utc

    def _reason_of_lists(self) -> Refusal | None:
        for chain in self.chains:
            for certificate in chain:
                for revoked in self.lists:
                    is_issuer = revoked.issuer == certificate.issuer
                    serial = certificate.serial_number
                    if is_issuer and revoked.get_revoked_certificate_by_serial_number(serial):
                        return Refusal.REVOKED
        return None


def refusal_of(prose: str, facts: ChainFacts) -> tuple[Refusal, str]:
    """Name and text for an error of the vendor's verifier."""
    text = prose.removeprefix("Verification failed: ")
    for phrase, reason in _BY_PHRASE:
        if phrase in text:
            return reason, text
    if any(phrase in text for phrase in _OF_CHAINS):
        reason = facts.reason()
        return reason, f"{_CHAIN_TEXTS.get(reason, _NO_CHAIN_TEXT)} ({text})"
    return Refusal.MALFORMED, text


def der_of_root(pem: bytes) -> bytes:
    """The one certificate of a root's PEM file.

    Raises:
        ConfigError: none, or more than one.
    """
    try:
        (root,) = x509.load_pem_x509_certificates(pem)
    except ValueError as error:
        raise ConfigError(f"a named root must be one PEM certificate: {error}") from error
    return root.public_bytes(Encoding.DER)


class _Collateral(msgspec.Struct):
    """What we read again of QuoteCollateralV3."""

    root_ca_crl: str
    pck_crl: str
    tcb_info_issuer_chain: str
    qe_identity_issuer_chain: str
    pck_certificate_chain: str | None = None

    @property
    def issuer_chains(self) -> tuple[str, str]:
        return self.tcb_info_issuer_chain, self.qe_identity_issuer_chain


def _is_broken(chain: list[x509.Certificate]) -> bool:
    try:
        for certificate, issuer in pairwise(chain):
            certificate.verify_directly_issued_by(issuer)
    except (ValueError, TypeError, InvalidSignature, UnsupportedAlgorithm):
        return True
    return False


def _key_sha256(certificate: x509.Certificate) -> str:
    key = certificate.public_key()
    der = key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    return hashlib.sha256(der).hexdigest()
