"""Every published sample gets the verdict that its notice states, at a frozen time.

The samples lie beside the checkout of our CI, where a skip is a failure; nothing of them is kept
here. Elsewhere the SEV-SNP ones come from a public package.
"""

import hashlib
from collections.abc import Mapping
from contextlib import suppress
from datetime import UTC, datetime

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import load_pem_public_key

from cutlayer.errors import AttestationError
from cutlayer.tee.assurance import Assurance
from cutlayer.tee.certificate_chain import check_chain, fingerprint, load_certificates
from cutlayer.tee.claims import Claims
from cutlayer.tee.evidence import Evidence, Platform
from cutlayer.tee.hcl_report import check_runtime_binding, parse_hcl_report
from cutlayer.tee.quote import COLLATERAL, parse_quote
from cutlayer.tee.tpm_attest import TpmSignature, check_signature
from cutlayer.tee.tpm_attest import parse_quote as parse_tpm_quote
from cutlayer.tee.verifier import Trust
from cutlayer.tee.verifiers.nvidia import NVIDIA_ROOTS
from cutlayer.tee.verifiers.sev_snp import AMD_ROOTS
from cutlayer.tee.verify import claims_of
from tests.unit.tee.evidence_samples import PUBLISHED_FOLDER, published
from tests.unit.tee.intel_quote_by_hand import check_quote_signatures
from tests.unit.tee.public_packages import snp_vectors

JULY_2025 = datetime(2025, 7, 1, tzinfo=UTC)
AUTUMN_2026 = datetime(2026, 10, 1, tzinfo=UTC)
INTEL_ROOT = "44a0196b2b99f889b8e149e95b807a350e7424964399e885a7cbb8ccfab674d3"
NITRO_TIMES = {
    "nitro_2a7c16f7.cbor": datetime(2022, 9, 28, 15, 33, 27, 680_000, UTC),
    "nitro_2db4a67c.cbor": datetime(2022, 9, 15, 17, 43, 28, 848_000, UTC),
}
PARSED_ONLY = {
    "quote_v5_sample.dat": (Platform.TDX, 5),
    "tdx_prod_quote_SPR_E4.dat": (Platform.TDX, 4),
    "cos113.dat": (Platform.TDX, 4),
}
HCL_REPORTS = {"hcl-report-snp.bin": Platform.SEV_SNP, "hcl-report-tdx.bin": Platform.TDX}

JUDGED_HERE = {
    *("sgx_quote", "tdx_quote", "tdx_quote_outdated"),
    *(f"{name}_collateral.json" for name in ("sgx_quote", "tdx_quote", "tdx_quote_outdated")),
    *PARSED_ONLY,
    *("quote_h200_2026-09-04.bin", "report_data_h200_2026-09-04.bin"),
    "intel_collateral_90c06f000000_2026-09-12.json",
    *("attestation.bin", "kds_vcek.der", "milan_ark.der", "milan_ask.der"),
    *("milan.pem", "genoa.pem", "turin_vcek.pem"),
    *NITRO_TIMES,
    *(f"az/{name}" for name in HCL_REPORTS),
    *("az/certs.pem", "az/quote.bin", "az/akpub.pem"),
}
READ_BY_PEOPLE = {"NOTICE.md", "az/var-data.bin"}
"""The second is runtime claims alone: no report binds them."""

system = pytest.mark.system


def verdict(
    platform: Platform, body: bytes, at: datetime, collateral: dict[str, bytes] | None = None
) -> Claims:
    evidence = Evidence(platform=platform, body=body, collateral=collateral or {})
    return claims_of(evidence, Trust(at=at))


def intel(platform: Platform, name: str, at: datetime) -> Claims:
    collateral = {COLLATERAL: published(f"{name}_collateral.json")}
    return verdict(platform, published(name), at, collateral)


def check_milan_report(vectors: Mapping[str, bytes], authorities: dict[str, bytes]) -> None:
    """Signature and chain hold up to AMD's own root; the guest was started for debugging."""
    collateral = {"vcek": vectors["kds_vcek.der"]} | authorities
    claims = verdict(Platform.SEV_SNP, vectors["attestation.bin"], AUTUMN_2026, collateral)
    assert claims.assurance is Assurance.HARDWARE_TEE
    assert claims.is_debug
    assert claims.measurements["measurement"].startswith("b07af9620f3b839b")
    assert claims.report_data[:5] == bytes([1, 2, 3, 4, 5])
    assert claims.details["product"] == "Milan-B0"
    assert claims.details["firmware"] == "1.49.3"


@system
def test_the_sgx_quote_needs_configuration_and_software_hardening() -> None:
    claims = intel(Platform.SGX, "sgx_quote", JULY_2025)
    assert claims.tcb_status == "ConfigurationAndSWHardeningNeeded"
    assert claims.advisories == ("INTEL-SA-00289", "INTEL-SA-00615")
    assert claims.assurance is Assurance.HARDWARE_TEE


@system
def test_the_tdx_quote_is_up_to_date() -> None:
    claims = intel(Platform.TDX, "tdx_quote", JULY_2025)
    assert (claims.tcb_status, claims.advisories) == ("UpToDate", ())


@system
def test_the_outdated_tdx_quote_matches_no_level_of_firmware() -> None:
    with pytest.raises(AttestationError, match="No matching TCB level") as caught:
        intel(Platform.TDX, "tdx_quote_outdated", datetime(2026, 3, 1, tzinfo=UTC))
    assert caught.value.refusal == "tcb"


@system
@pytest.mark.parametrize("name", PARSED_ONLY)
def test_quotes_without_collateral_are_read_and_not_believed(name: str) -> None:
    quote = parse_quote(published(name))
    assert (quote.platform, quote.version) == PARSED_ONLY[name]
    with pytest.raises(AttestationError) as caught:
        verdict(quote.platform, published(name), JULY_2025)
    assert caught.value.refusal == "no-collateral"


@system
def test_the_quote_of_an_h200_machine_is_signed_up_to_intels_root_and_no_full_verdict() -> None:
    body, at = published("quote_h200_2026-09-04.bin"), datetime(2026, 9, 12, tzinfo=UTC)
    quote = parse_quote(body)
    chain = load_certificates(quote.chain_pem, "chain")
    check_chain(chain, at=at, roots={INTEL_ROOT}, what="the H200 machine's chain")
    check_quote_signatures(body, chain[0])
    assert quote.report_data == published("report_data_h200_2026-09-04.bin")
    # What came with it has no revocation lists: our verifier will not do without.
    without_lists = {COLLATERAL: published("intel_collateral_90c06f000000_2026-09-12.json")}
    for collateral, name in (({}, "no-collateral"), (without_lists, "malformed")):
        with pytest.raises(AttestationError) as caught:
            verdict(Platform.TDX, body, at, collateral)
        assert caught.value.refusal == name


@system
def test_the_milan_report_holds_and_is_a_debug_one() -> None:
    vectors = {name: published(name) for name in ("attestation.bin", "kds_vcek.der")}
    check_milan_report(vectors, {"chain": published("milan.pem")})


def test_the_same_report_from_a_public_package_holds_anywhere(
    pytestconfig: pytest.Config,
) -> None:
    vectors = snp_vectors(pytestconfig.cache.mkdir("evidence"))
    authorities = {name: vectors[f"milan_{name}.der"] for name in ("ask", "ark")}
    check_milan_report(vectors, authorities)


@system
def test_the_chips_serial_is_zero_and_a_parser_that_refuses_it_changes_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    vectors = {name: published(name) for name in ("attestation.bin", "kds_vcek.der")}
    # Today's parser warns; one that refuses raises ValueError, and is welcome to.
    with suppress(ValueError), pytest.warns(UserWarning, match="serial number"):
        assert x509.load_der_x509_certificate(vectors["kds_vcek.der"]).serial_number == 0

    def refuse(data: bytes) -> x509.Certificate:
        assert data != vectors["kds_vcek.der"], "the chip's certificate reached the full parser"
        return real(data)

    real = x509.load_der_x509_certificate
    monkeypatch.setattr(x509, "load_der_x509_certificate", refuse)
    check_milan_report(vectors, {"chain": published("milan.pem")})


@system
@pytest.mark.parametrize("name", ["milan.pem", "genoa.pem", "turin_vcek.pem"])
def test_amds_published_chains_end_at_the_roots_that_we_know(name: str) -> None:
    chain = load_certificates(published(name), name)
    check_chain(chain, at=AUTUMN_2026, roots=AMD_ROOTS, what=name, num_below=1)
    common_name = chain[-1].subject.rfc4514_string().split(",")[0]
    assert f"CN={AMD_ROOTS[fingerprint(chain[-1])]}" == common_name


@system
def test_the_milan_authorities_alone_are_those_of_the_chain() -> None:
    alone = [load_certificates(published(f"milan_{part}.der"), part)[0] for part in ("ask", "ark")]
    assert alone == load_certificates(published("milan.pem"), "milan.pem")


@system
@pytest.mark.parametrize("name", NITRO_TIMES)
def test_nitro_documents_verify_at_their_own_time(name: str) -> None:
    claims = verdict(Platform.NITRO, published(name), NITRO_TIMES[name])
    assert claims.issued_at == NITRO_TIMES[name]
    assert (claims.assurance, claims.is_debug) == (Assurance.HARDWARE_TEE, False)
    assert claims.report_data.startswith(b'{"')
    assert claims.measurements["pcr1"].startswith("bcdf05fefccaa8e55bf2")


@system
@pytest.mark.parametrize("name", HCL_REPORTS)
def test_azures_reports_bind_their_runtime_claims(name: str) -> None:
    body = published(f"az/{name}")
    report = parse_hcl_report(body)
    assert report.platform is HCL_REPORTS[name]
    assert report.report_data[:32] == hashlib.sha256(report.runtime_json).digest()
    check_runtime_binding(report, report.report_data)
    assert report.attestation_key().key_size == 2048
    with pytest.raises(AttestationError) as caught:
        verdict(Platform.AZURE, body, AUTUMN_2026)
    assert caught.value.refusal == "no-collateral"


@system
def test_azures_certificates_are_a_chain_of_another_chip_than_its_report() -> None:
    end = b"-----END CERTIFICATE-----\n"
    vcek, ask, ark, _ = published("az/certs.pem").split(end)
    collateral = {"vcek": vcek + end, "chain": ask + end + ark + end}
    with pytest.raises(AttestationError) as caught:
        verdict(Platform.AZURE, published("az/hcl-report-snp.bin"), AUTUMN_2026, collateral)
    assert caught.value.refusal == "bad-signature"


@system
def test_azures_vtpm_quote_is_signed_by_its_key_over_the_word_challenge() -> None:
    # The file: length and signature, length and TPMS_ATTEST, then PCR values.
    data = published("az/quote.bin")
    signature, message = data[8 : 8 + 256], data[8 + 256 + 8 :]
    num_bytes = int.from_bytes(data[264:272], "little")
    key = load_pem_public_key(published("az/akpub.pem"))
    found = TpmSignature(scheme="rsassa", hash_name="sha256", value=signature)
    check_signature(message[:num_bytes], found, key)
    assert parse_tpm_quote(message[:num_bytes]).nonce == b"challenge"
    with pytest.raises(AttestationError):
        check_signature(message[: num_bytes - 1], found, key)


@system
def test_nvidias_published_roots_are_those_that_we_know() -> None:
    for name in ("device", "RIM"):
        (root,) = load_certificates(published(f"nv/verifier_{name}_root.pem"), name)
        assert fingerprint(root) in NVIDIA_ROOTS


@system
def test_no_sample_is_left_without_a_verdict() -> None:
    published("NOTICE.md")
    files = {str(path.relative_to(PUBLISHED_FOLDER)) for path in PUBLISHED_FOLDER.rglob("*")}
    folders = {"az", "nv"}
    # The verdicts of these are in `verifiers/test_nvidia`.
    of_gpus = {name for name in files if name.startswith(("nras_", "nv/"))}
    assert files - folders - of_gpus == JUDGED_HERE | READ_BY_PEOPLE
