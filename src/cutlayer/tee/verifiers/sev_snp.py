"""AMD SEV-SNP: a report signed by the chip, whose key AMD vouches for.

Collateral: `vcek` or `vlek` (DER or PEM: the signing key's certificate), `chain` (PEM: ASK or
ASVK, then ARK), or instead of both `auxblob` (the host's certificate table, as configfs-tsm has
it), and `crl` (AMD's revocation list, DER), which is checked where it is given. It fetches none.
AMD publishes no list of good firmware: pin `reported_tcb` or `committed_tcb` in the policy.
"""

from dataclasses import dataclass

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature

from cutlayer.tee.believed_roots import believed_roots
from cutlayer.tee.certificate_chain import (
    check_chain,
    check_dates,
    load_certificates,
    load_revocation_list,
)
from cutlayer.tee.claims import Claims
from cutlayer.tee.evidence import Evidence, Platform
from cutlayer.tee.refusal import Refusal, refused
from cutlayer.tee.snp_certificate import (
    SnpSigner,
    certificates_of_table,
    check_signed_by,
    read_snp_signer,
)
from cutlayer.tee.snp_report import SnpReport, parse_snp_report, parse_tcb
from cutlayer.tee.verifier import VERIFIERS, Trust

__all__ = ["AMD_ROOTS", "SevSnpVerifier"]

AMD_ROOTS = {
    "69d063b45344d26a2e94e1f4210de49ef555308287d4c174445c95639a540bcd": "ARK-Milan",
    "4c6598d19c18719c5dfd4a7d335f674e5bfe1d8f800cea2cf270c10d103db2f1": "ARK-Genoa",
    "1f084161a44bb6d93778a904877d4819cafa5d05ef4193b2ded9dd9c73dd3f6a": "ARK-Turin",
}
"""AMD's root certificates by SHA-256 of their DER, as AMD's key service publishes them."""

_KEY_NAMES = {0: "vcek", 1: "vlek"}


@dataclass(frozen=True, kw_only=True)
class _Collateral:
    """The signing key's certificate and the chain above it."""

    signer: SnpSigner
    chain: list[x509.Certificate]
    revocation_lists: list[x509.CertificateRevocationList]


@VERIFIERS.register(Platform.SEV_SNP)
class SevSnpVerifier:
    """Reports of version 2 to 5 on Milan, Genoa (with Bergamo, Siena) and Turin."""

    def verify(self, evidence: Evidence, trust: Trust) -> Claims:
        """What the report says.

        Raises:
            AttestationError: see `Verifier`.
        """
        report = parse_snp_report(evidence.body)
        name = _key_name(report)
        collateral = _collateral(evidence, name)
        roots = believed_roots(trust, Platform.SEV_SNP, AMD_ROOTS)
        _check_certificates(collateral, trust, roots.fingerprints, name)
        _check_signature(report, collateral.signer, name)
        _check_chip(report, collateral.signer)
        _check_tcb(report, collateral.signer)
        return Claims(
            platform=Platform.SEV_SNP,
            assurance=roots.assurance,
            measurements=_measurements(report) | _provider(collateral.signer),
            report_data=report.report_data,
            is_debug=report.is_debug,
            tcb_status=_tcb_status(report),
            chip=report.chip_id.hex() if any(report.chip_id) else None,
            details=_details(report, collateral, name),
        )


def _key_name(report: SnpReport) -> str:
    if report.is_chip_key_masked or report.signing_key not in _KEY_NAMES:
        raise refused(
            Refusal.BAD_SIGNATURE, "the platform's owner switched the report's signature off"
        )
    return _KEY_NAMES[report.signing_key]


def _collateral(evidence: Evidence, name: str) -> _Collateral:
    found = dict(evidence.collateral)
    if "auxblob" in found:
        found = certificates_of_table(found["auxblob"]) | found
    if name not in found:
        raise refused(
            Refusal.NO_COLLATERAL, f"the certificate {name!r} of the key that signed is missing"
        )
    if "chain" in found:
        chain = load_certificates(found["chain"], "chain")
    elif "ask" in found and "ark" in found:
        chain = [load_certificates(found[part], part)[0] for part in ("ask", "ark")]
    else:
        raise refused(Refusal.NO_COLLATERAL, "AMD's certificate chain 'chain' is missing")
    return _Collateral(
        signer=read_snp_signer(found[name], name),
        chain=chain,
        revocation_lists=[load_revocation_list(found["crl"], "crl")] if "crl" in found else [],
    )


def _check_certificates(
    collateral: _Collateral, trust: Trust, roots: frozenset[str], name: str
) -> None:
    _check_kind(collateral.signer, name)
    leaf, chain = collateral.signer.certificate, collateral.chain
    if chain:
        check_signed_by(leaf, chain[0], name)
    check_chain(
        chain,
        at=trust.at,
        roots=roots,
        what="AMD's chain",
        revocation_lists=collateral.revocation_lists,
        num_below=1,
    )
    check_dates(leaf.begin, leaf.end, trust.at, f"certificate {name}")


def _check_kind(signer: SnpSigner, name: str) -> None:
    # AMD certifies both kinds; one must not pass for the other, whose checks differ.
    is_chips, is_providers = signer.chip_id is not None, signer.provider is not None
    if (is_chips, is_providers) != (name == "vcek", name == "vlek"):
        raise refused(Refusal.BAD_CHAIN, f"the certificate {name!r} is of another kind of key")


def _check_signature(report: SnpReport, signer: SnpSigner, name: str) -> None:
    try:
        signature = encode_dss_signature(*report.signature)
        signer.key.verify(signature, report.signed, ec.ECDSA(hashes.SHA384()))
    except (InvalidSignature, ValueError) as error:
        raise refused(
            Refusal.BAD_SIGNATURE, f"the report is not signed by the key of this {name}"
        ) from error


def _check_chip(report: SnpReport, signer: SnpSigner) -> None:
    # Zeros: the platform's owner hides the number; the key itself is still that chip's.
    if signer.chip_id is None or not any(report.chip_id):
        return
    if report.chip_id != signer.chip_id:
        raise refused(Refusal.WRONG_CHIP, "report and certificate name two chips")


def _check_tcb(report: SnpReport, signer: SnpSigner) -> None:
    reported = parse_tcb(report.reported_tcb, signer.product)
    if reported != signer.tcb:
        raise refused(
            Refusal.TCB,
            f"the report says {reported}, its key's certificate says {signer.tcb}; fetch the "
            "certificate for the reported versions",
        )


def _tcb_status(report: SnpReport) -> str:
    is_final = report.committed_tcb == report.current_tcb
    is_final = is_final and report.committed_firmware == report.current_firmware
    return "UpToDate" if is_final else "Provisional"


def _measurements(report: SnpReport) -> dict[str, str]:
    blobs = {
        "measurement": report.measurement,
        "host_data": report.host_data,
        "id_key_digest": report.id_key_digest,
        "author_key_digest": report.author_key_digest,
        "report_id": report.report_id,
        "report_id_ma": report.report_id_ma,
        "family_id": report.family_id,
        "image_id": report.image_id,
        "current_tcb": report.current_tcb,
        "reported_tcb": report.reported_tcb,
        "committed_tcb": report.committed_tcb,
        "launch_tcb": report.launch_tcb,
    }
    numbers = {
        "policy": report.policy.to_bytes(8),
        "platform_info": report.platform_info.to_bytes(8),
        "guest_svn": report.guest_svn.to_bytes(4),
        "vmpl": report.vmpl.to_bytes(4),
    }
    return {name: value.hex() for name, value in (blobs | numbers).items()}


def _provider(signer: SnpSigner) -> dict[str, str]:
    # In hex, as everything that a policy pins: the cloud that AMD made the key for.
    return {} if signer.provider is None else {"provider": signer.provider.encode().hex()}


def _details(report: SnpReport, collateral: _Collateral, name: str) -> dict[str, str]:
    signer = collateral.signer
    details = {
        "report_version": str(report.version),
        "product": signer.product,
        "signed_by": name,
        "firmware": ".".join(str(number) for number in report.current_firmware),
        "tcb": str(parse_tcb(report.reported_tcb, signer.product)),
        "platform": ", ".join(report.platform_flags),
        "smt_allowed": str(report.is_smt_allowed),
        "migratable": str(report.is_migratable),
        "single_socket": str(report.is_single_socket),
        "revocation": "checked" if collateral.revocation_lists else "no list was given",
    }
    if report.cpuid is not None:
        details["cpuid"] = "family 0x{:x} model 0x{:x} stepping 0x{:x}".format(*report.cpuid)
    if report.current_mitigations is not None:
        details["mitigations"] = f"0x{report.current_mitigations:x}"
    if signer.provider is not None:
        details["provider"] = signer.provider
    return details
