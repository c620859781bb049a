"""AWS Nitro Enclaves: a document by the hypervisor, under AWS's root. Needs no collateral.

The document carries its own chain. AWS publishes no revocation list that a verdict could demand
(its authorities live for hours to days); `crl` is checked where it is given.
"""

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature

from cutlayer.tee.believed_roots import believed_roots
from cutlayer.tee.certificate_chain import (
    check_chain,
    issuer_key,
    load_certificates,
    load_revocation_list,
)
from cutlayer.tee.claims import Claims
from cutlayer.tee.evidence import Evidence, Platform
from cutlayer.tee.nitro_document import NitroDocument, parse_nitro_document
from cutlayer.tee.refusal import Refusal, refused
from cutlayer.tee.verifier import VERIFIERS, Trust

__all__ = ["AWS_NITRO_ROOT", "NitroVerifier"]

AWS_NITRO_ROOT = "641a0321a3e244efe456463195d606317ed7cdcc3c1756e09893f3c68f79bb5b"
"""SHA-256 of the DER of AWS's root `aws.nitro-enclaves`, as AWS publishes it."""


@VERIFIERS.register(Platform.NITRO)
class NitroVerifier:
    """Documents of the Nitro security module; `report_data` is their `user_data`."""

    def verify(self, evidence: Evidence, trust: Trust) -> Claims:
        """What the document says.

        Raises:
            AttestationError: see `Verifier`.
        """
        document = parse_nitro_document(evidence.body)
        roots = believed_roots(trust, Platform.NITRO, {AWS_NITRO_ROOT})
        chain = _chain(document)
        crl = evidence.collateral.get("crl")
        check_chain(
            chain,
            at=trust.at,
            roots=roots.fingerprints,
            what="the Nitro document's chain",
            revocation_lists=[] if crl is None else [load_revocation_list(crl, "crl")],
        )
        _check_signature(document, chain[0])
        return Claims(
            platform=Platform.NITRO,
            assurance=roots.assurance,
            measurements={f"pcr{index}": pcr.hex() for index, pcr in document.pcrs.items()},
            report_data=document.user_data,
            # AWS: an enclave that was started in debug mode has zeros in its PCRs.
            is_debug=not any(document.pcrs[0]),
            tcb_status="UpToDate",
            issued_at=document.made_at,
            details=_details(document),
        )


def _chain(document: NitroDocument) -> list[x509.Certificate]:
    ders = [document.certificate, *reversed(document.authorities)]
    return [load_certificates(der, "the Nitro document's chain")[0] for der in ders]


def _check_signature(document: NitroDocument, signer: x509.Certificate) -> None:
    key = issuer_key(signer)
    if not isinstance(key, ec.EllipticCurvePublicKey) or key.curve.name != "secp384r1":
        raise refused(Refusal.BAD_SIGNATURE, "the Nitro module's key is not of curve P-384")
    try:
        signature = encode_dss_signature(*document.signature)
        key.verify(signature, document.signed, ec.ECDSA(hashes.SHA384()))
    except InvalidSignature as error:
        raise refused(
            Refusal.BAD_SIGNATURE, "the Nitro document is not signed by its certificate's key"
        ) from error


def _details(document: NitroDocument) -> dict[str, str]:
    details = {"module_id": document.module_id}
    if document.nonce:
        details["nonce"] = document.nonce.hex()
    if document.public_key:
        details["public_key"] = document.public_key.hex()
    return details
