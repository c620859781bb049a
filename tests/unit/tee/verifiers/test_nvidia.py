"""NVIDIA's reports, manifests and tokens: the published ones, and those of a GPU made here."""

import base64
import json
from collections.abc import Mapping
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import msgspec
import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from cutlayer.errors import AttestationError
from cutlayer.tee import nvidia_token
from cutlayer.tee.assurance import Assurance
from cutlayer.tee.claims import Claims
from cutlayer.tee.evidence import Evidence, Platform
from cutlayer.tee.policy import Policy, appraise
from cutlayer.tee.verifier import Trust
from cutlayer.tee.verify import claims_of
from tests.unit.tee.authorities import (
    AT,
    Authority,
    Wish,
    ec_key,
    issue,
    revocation_list,
    rsa_key,
)
from tests.unit.tee.evidence_samples import published
from tests.unit.tee.nvidia_worlds import DRIVER, KID, VBIOS, Gpu, measured

SEPTEMBER_2026 = datetime(2026, 9, 10, 18, 20, tzinfo=UTC)
TEXT_REPORTS = {
    "nv/hopperAttestationReport.txt": "nv/hopperCertChain.txt",
    "nv/sample_attestation_data_gpu_hopperAttestationReport.txt": (
        "nv/sample_attestation_data_gpu_hopperCertChain.txt"
    ),
    "nv/sample_attestation_data_gpu_blackwellAttestationReport.txt": (
        "nv/sample_attestation_data_gpu_blackwellCertChain.txt"
    ),
}
BAD_REPORT = "nv/sample_attestation_data_gpu_hopperAttestationReportInvalidSignature.txt"
BAD_CHAIN = "nv/sample_attestation_data_gpu_hopperCertChainExpired.txt"
RIM = "nv/NV_GPU_DRIVER_GH100_550.144.03.xml"
TOKENS, KEY_SET = "nras_ppcie_8xh100_2026-09-10.json", "nras_jwks_2026-09-12.json"


@pytest.fixture(scope="module")
def gpu() -> Gpu:
    return Gpu()


def judged(gpu: Gpu, evidence: Evidence) -> Claims:
    return claims_of(evidence, Trust(at=AT, roots={Platform.NVIDIA: gpu.root.pem}))


def refusal(gpu: Gpu, evidence: Evidence) -> str:
    with pytest.raises(AttestationError) as caught:
        judged(gpu, evidence)
    return caught.value.refusal


def text_evidence(report: str, chain: str, **more: bytes) -> Evidence:
    body = bytes.fromhex(published(report).decode().strip())
    collateral = {"chain": published(chain), **more}
    return Evidence(platform=Platform.NVIDIA, body=body, collateral=collateral)


def json_evidence(name: str) -> list[Evidence]:
    """The files in which NVIDIA's tools keep evidence, with the nonce they state."""
    return [
        Evidence(
            platform=Platform.NVIDIA,
            body=base64.b64decode(entry["evidence"]),
            collateral={"chain": base64.b64decode(entry["certificate"])},
        )
        for entry in json.loads(published(f"nv/{name}.json"))
    ]


def at_september(evidence: Evidence) -> Claims:
    return claims_of(evidence, Trust(at=SEPTEMBER_2026))


def published_refusal(evidence: Evidence, at: datetime = SEPTEMBER_2026) -> str:
    with pytest.raises(AttestationError) as caught:
        claims_of(evidence, Trust(at=at))
    return caught.value.refusal


@pytest.mark.system
@pytest.mark.parametrize(("report", "chain"), TEXT_REPORTS.items())
def test_published_report_leads_to_nvidias_root(report: str, chain: str) -> None:
    claims = at_september(text_evidence(report, chain))
    # Alone: nothing says which program asked.
    assert claims.assurance is Assurance.MEASURED_BOOT
    assert claims.tcb_status == "NotCompared"
    assert {f"measurement_{index}" for index in range(64)} <= set(claims.measurements)


@pytest.mark.system
def test_published_reports_say_driver_and_vbios() -> None:
    claims = [at_september(text_evidence(*pair)) for pair in TEXT_REPORTS.items()]
    found = [(one.details["driver"], one.details["vbios"]) for one in claims]
    assert found == [
        ("580.159.03", "96.00.74.00.20"),
        ("535.86.09", "96.00.5E.00.01"),
        ("575.32", "97.00.88.00.0F"),
    ]


@pytest.mark.system
def test_published_gpus_of_one_machine_share_the_nonce() -> None:
    claims = [at_september(evidence) for evidence in json_evidence("multi_gpu_hopper")]
    stated = json.loads(published("nv/multi_gpu_hopper.json"))[0]["nonce"]
    assert [one.report_data.hex() for one in claims] == [stated] * 4
    assert len({one.chip for one in claims}) == 4
    assert {one.details["protected_pcie"] for one in claims} == {"True"}


@pytest.mark.system
@pytest.mark.parametrize("chain", [*TEXT_REPORTS.values(), BAD_CHAIN])
def test_published_report_with_a_wrong_signature_is_refused(chain: str) -> None:
    assert published_refusal(text_evidence(BAD_REPORT, chain)) == "bad-signature"


@pytest.mark.system
@pytest.mark.parametrize("report", [*TEXT_REPORTS, BAD_REPORT])
def test_published_chain_called_expired_vouches_for_no_report(report: str) -> None:
    # Its dates end in the year 9999: what refuses it is that it certifies another key.
    assert published_refusal(text_evidence(report, BAD_CHAIN)) == "bad-signature"


@pytest.mark.system
def test_published_manifest_is_nvidias_and_of_another_driver() -> None:
    evidence = text_evidence(*next(iter(TEXT_REPORTS.items())), rim=published(RIM))
    with pytest.raises(AttestationError, match=r"measurements 7, .*GH100 550\.144\.03") as caught:
        at_september(evidence)
    assert caught.value.refusal == "wrong-measurement"


@pytest.mark.system
def test_published_manifest_with_one_value_changed_is_refused() -> None:
    changed = published(RIM).replace(b'Hash0="4a5e', b'Hash0="4a5f')
    assert changed != published(RIM)
    evidence = text_evidence(*next(iter(TEXT_REPORTS.items())), rim=changed)
    assert published_refusal(evidence) == "bad-signature"


def token_evidence(body: str, keys: str) -> Evidence:
    collateral = {"jwks": published(keys)}
    return Evidence(platform=Platform.NVIDIA, body=published(body), collateral=collateral)


def issued(body: str) -> datetime:
    """When a published answer was given: the time of the verdict."""
    middle = json.loads(published(body))[1]["REMOTE_GPU_CLAIMS"][0][1].split(".")[1]
    return datetime.fromtimestamp(json.loads(base64.urlsafe_b64decode(middle + "=="))["iat"], UTC)


@pytest.mark.system
def test_published_token_is_about_eight_gpus() -> None:
    claims = claims_of(token_evidence(TOKENS, KEY_SET), Trust(at=issued(TOKENS)))
    everyone = [claims, *claims.companions]
    assert len({one.chip for one in everyone}) == 8
    assert {one.assurance for one in everyone} == {Assurance.MEASURED_BOOT}
    assert {one.details["driver"] for one in everyone} == {"595.71.05"}
    assert {one.tcb_status for one in everyone} == {"UpToDate"}
    assert not any(one.is_debug for one in everyone)


@pytest.mark.system
def test_published_token_expires_after_an_hour() -> None:
    evidence = token_evidence(TOKENS, KEY_SET)
    assert published_refusal(evidence, datetime(2026, 9, 10, 23, tzinfo=UTC)) == "expired"
    assert published_refusal(evidence, datetime(2026, 9, 10, 6, tzinfo=UTC)) == "not-yet-valid"


@pytest.mark.system
@pytest.mark.parametrize(
    ("body", "keys"),
    [
        ("nras_h200_2026-09-04.json", KEY_SET),
        (TOKENS, "nras_jwks_2026-10-22_two_intermediates.json"),
    ],
)
def test_published_token_wants_the_key_set_of_its_day(body: str, keys: str) -> None:
    assert published_refusal(token_evidence(body, keys), issued(body)) == "no-collateral"


def _mutated(body: bytes, gpu: str, **changes: object) -> bytes:
    """Claims changed under the old signature."""
    outer = json.loads(body)
    inner = outer[1]["REMOTE_GPU_CLAIMS"]
    head, middle, end = (inner[0][1] if gpu == "overall" else inner[1][gpu]).split(".")
    claims = json.loads(base64.urlsafe_b64decode(middle + "==")) | changes
    middle = base64.urlsafe_b64encode(json.dumps(claims).encode()).decode().rstrip("=")
    if gpu == "overall":
        inner[0][1] = f"{head}.{middle}.{end}"
    else:
        inner[1][gpu] = f"{head}.{middle}.{end}"
    return json.dumps(outer).encode()


@pytest.mark.system
@pytest.mark.parametrize("gpu", ["overall", "GPU-0", "GPU-7"])
def test_published_token_with_another_nonce_is_refused(gpu: str) -> None:
    body = _mutated(published(TOKENS), gpu, eat_nonce="00" * 32)
    evidence = Evidence(
        platform=Platform.NVIDIA, body=body, collateral={"jwks": published(KEY_SET)}
    )
    assert published_refusal(evidence, issued(TOKENS)) == "bad-signature"


@pytest.mark.system
def test_key_set_of_somebody_else_is_not_nvidias(gpu: Gpu) -> None:
    # Right key identifier, a certificate that NVIDIA never signed.
    keys = json.loads(published(KEY_SET))["keys"]
    own = json.loads(gpu.key_set)["keys"][0]["x5c"][:2]
    forged = json.dumps({"keys": [{**key, "x5c": own} for key in keys]}).encode()
    evidence = replace_collateral(token_evidence(TOKENS, KEY_SET), "jwks", forged)
    assert published_refusal(evidence, issued(TOKENS)) == "wrong-root"


def replace_collateral(evidence: Evidence, name: str, data: bytes) -> Evidence:
    return Evidence(
        platform=evidence.platform,
        body=evidence.body,
        collateral={**evidence.collateral, name: data},
    )


def test_report_under_a_tests_root_is_simulated(gpu: Gpu) -> None:
    claims = judged(gpu, gpu.evidence(gpu.report(nonce=bytes(range(32)))))
    assert claims.assurance is Assurance.SIMULATED
    assert claims.report_data == bytes(range(32))
    assert bytes.fromhex(claims.measurements["driver_version"]) == DRIVER.encode()
    assert claims.measurements["vbios_version"] == "9600740020"
    assert claims.details["vbios"] == VBIOS


def test_report_is_read_in_every_form_of_nvidias_tools(gpu: Gpu) -> None:
    plain = judged(gpu, gpu.evidence())
    assert judged(gpu, gpu.evidence(plain_hex(gpu.report()))).measurements == plain.measurements
    both = judged(gpu, collection(gpu, replace_chip(gpu)))
    assert [one.chip for one in (both, *both.companions)] == ["7", "8"]


def plain_hex(report: bytes) -> bytes:
    return (report.hex() + "\n").encode()


def collection(*gpus: Gpu) -> Evidence:
    entries = [
        {
            "arch": "HOPPER",
            "nonce": "00" * 32,
            "evidence": base64.b64encode(one.report()).decode(),
            "certificate": base64.b64encode(one.chain).decode(),
        }
        for one in gpus
    ]
    return Evidence(platform=Platform.NVIDIA, body=json.dumps(entries, indent=2).encode())


@pytest.mark.parametrize(
    "body",
    [
        b"11e0 is no hex",
        b"[{}]",
        b'[{"evidence": "!", "certificate": "!"}]',
        b'[{"evidence": "AAAA", "certificate": "AAAA"}]',
        b"[[]]",
        b"[" * 100_000,
        b'[{"evidence": "AAAA", "certificate": "AAAA"}' + b', {"a": 1}' * 70 + b"]",
        b'[{"a": ' + b"[" * 100_000,
    ],
)
def test_form_that_is_none_is_malformed(gpu: Gpu, body: bytes) -> None:
    evidence = gpu.evidence(body, jwks=b"{}")
    assert refusal(gpu, evidence) == "malformed"


def test_gpu_stands_beside_a_cpu_not_beside_a_gpu(gpu: Gpu) -> None:
    nested = msgspec.structs.replace(gpu.evidence(), companions=[gpu.evidence()])
    assert refusal(gpu, nested) == "malformed"


def test_nvidias_root_does_not_vouch_for_it(gpu: Gpu) -> None:
    assert published_refusal(gpu.evidence(), AT) == "wrong-root"


def test_both_manifests_make_a_report_up_to_date(gpu: Gpu) -> None:
    good = {"rim": gpu.manifest(), "vbios_rim": gpu.manifest(VBIOS)}
    assert judged(gpu, gpu.evidence(**good)).tcb_status == "UpToDate"
    driver_alone = gpu.evidence(rim=gpu.manifest())
    assert judged(gpu, driver_alone).tcb_status == "VbiosNotCompared"


def test_other_firmware_than_the_manifests_is_refused(gpu: Gpu) -> None:
    report = gpu.report(measurements={index: measured(index + 1) for index in range(64)})
    assert refusal(gpu, gpu.evidence(report, rim=gpu.manifest())) == "wrong-measurement"
    few = gpu.report(measurements={0: measured(0)})
    assert refusal(gpu, gpu.evidence(few, rim=gpu.manifest())) == "wrong-measurement"


def test_manifest_of_another_version_is_refused(gpu: Gpu) -> None:
    assert refusal(gpu, gpu.evidence(rim=gpu.manifest("600.2"))) == "wrong-measurement"


def test_video_decoder_counts_only_where_it_is_on(gpu: Gpu) -> None:
    manifest = gpu.manifest(golden={35: ["ee" * 48], 1: [measured(1)]})
    judged(gpu, gpu.evidence(rim=manifest))


def test_certificate_for_other_firmware_is_refused(gpu: Gpu) -> None:
    other = replace(gpu, fwid=bytes(48))
    assert refusal(other, other.evidence()) == "bad-chain"


def test_revoked_gpu_is_refused(gpu: Gpu) -> None:
    crl = revocation_list(gpu.root, [gpu.middle.certificate.serial_number])
    assert refusal(gpu, gpu.evidence(crl=crl)) == "revoked"
    judged(gpu, gpu.evidence(crl=revocation_list(gpu.root, [99])))


def test_switch_is_no_gpu(gpu: Gpu) -> None:
    switch = replace(gpu, name="LS10 A01 FMC LF")
    assert refusal(switch, switch.evidence()) == "other-platform"


def test_report_of_one_gpu_does_not_count_twice(gpu: Gpu) -> None:
    one = judged(gpu, gpu.evidence())
    other = judged(gpu, replace_chip(gpu).evidence())
    policy = Policy(
        name="two GPUs",
        platforms=[Platform.SIMULATED],
        least_assurance="simulated",
        tcb_statuses=["UpToDate", "NotCompared"],
        gpus=2,
    )
    cpu = replace(one, platform=Platform.SIMULATED, tcb_status="UpToDate")
    appraise(replace(cpu, companions=(one, other)), policy, AT, None)
    with pytest.raises(AttestationError, match="no-gpu"):
        appraise(replace(cpu, companions=(one, one)), policy, AT, None)
    strict = policy.model_copy(update={"tcb_statuses": ["UpToDate"]})
    with pytest.raises(AttestationError, match="tcb: an accelerator's firmware is NotCompared"):
        appraise(replace(cpu, companions=(one, other)), strict, AT, None)


def replace_chip(gpu: Gpu) -> Gpu:
    return replace(gpu, serial=8)


def test_tokens_of_two_gpus_are_two_companions_of_a_cpu(gpu: Gpu) -> None:
    claims = judged(gpu, gpu.token_evidence())
    assert [one.chip for one in (claims, *claims.companions)] == ["1000", "1001"]
    assert claims.assurance is Assurance.SIMULATED
    assert claims.report_data == bytes(32)
    assert claims.issued_at == AT


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"measres": "fail"}, "wrong-measurement"),
        ({"x-nvidia-gpu-attestation-report-nonce-match": False}, "wrong-measurement"),
        ({"eat_nonce": "11" * 32}, "wrong-binding"),
        ({"iss": "https://nras.example"}, "wrong-root"),
        ({"exp": 10}, "expired"),
        ({"nbf": int(AT.timestamp()) + 60}, "not-yet-valid"),
        ({"nbf": -(10**18)}, "malformed"),
        ({"exp": 10**30}, "malformed"),
        ({"ueid": 7}, "malformed"),
    ],
)
def test_service_that_does_not_approve_is_refused(
    gpu: Gpu, changes: Mapping[str, object], expected: str
) -> None:
    assert refusal(gpu, gpu.token_evidence(gpu.tokens(**changes))) == expected


def test_service_that_does_not_approve_the_whole_is_refused(gpu: Gpu) -> None:
    assert refusal(gpu, gpu.token_evidence(gpu.tokens(is_good=False))) == "wrong-measurement"


@pytest.fixture
def service(gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> Gpu:
    """NVIDIA's service, were its authority this test's."""
    key = gpu.root.certificate.public_key()
    assert isinstance(key, ec.EllipticCurvePublicKey)
    point = key.public_bytes(Encoding.X962, PublicFormat.CompressedPoint)
    monkeypatch.setattr(nvidia_token, "SERVICE_KEY", point)
    return gpu


def by_service(gpu: Gpu, *chain: Authority, at: datetime = AT) -> Claims:
    evidence = replace_collateral(gpu.token_evidence(), "jwks", gpu.key_set_of(*chain))
    return claims_of(evidence, Trust(at=at))


def service_refusal(gpu: Gpu, *chain: Authority) -> str:
    with pytest.raises(AttestationError) as caught:
        by_service(gpu, *chain)
    return caught.value.refusal


def test_key_of_the_service_is_hardware(service: Gpu) -> None:
    claims = by_service(service, service.leaf, service.middle)
    assert claims.assurance is Assurance.MEASURED_BOOT


def test_chain_of_the_service_is_checked(service: Gpu) -> None:
    leaf, middle, root = service.leaf, service.middle, service.root
    old = Wish(end=AT - timedelta(days=1))
    no_authority = issue("no authority", ec_key(), root, Wish(is_authority=False))
    old_middle = issue("old", ec_key(), root, old)
    assert service_refusal(service, leaf, middle, root) == "bad-chain"
    assert service_refusal(service, leaf) == "bad-chain"
    assert service_refusal(service, leaf, Gpu().middle) == "wrong-root"
    assert service_refusal(service, Gpu().leaf, middle) == "bad-chain"
    assert service_refusal(service, issue("a", leaf.key, no_authority), no_authority) == "bad-chain"
    assert service_refusal(service, issue("a", leaf.key, old_middle), old_middle) == "expired"
    assert service_refusal(service, issue("a", leaf.key, middle, old), middle) == "expired"
    assert service_refusal(service, issue("a", rsa_key(), middle), middle) == "bad-signature"


@pytest.mark.parametrize("change", [{"dbgstat": "enabled"}, {"secboot": False}, {"secboot": None}])
def test_debug_gpu_says_so(gpu: Gpu, change: Mapping[str, object]) -> None:
    assert judged(gpu, gpu.token_evidence(gpu.tokens(**change))).is_debug


def test_bundle_without_one_of_its_gpus_is_refused(gpu: Gpu) -> None:
    overall, parts = json.loads(gpu.tokens())
    del parts["GPU-1"]
    assert refusal(gpu, gpu.token_evidence(json.dumps([overall, parts]).encode())) == "malformed"


def test_gpu_of_another_bundle_is_refused(gpu: Gpu) -> None:
    overall, _ = json.loads(gpu.tokens())
    _, parts = json.loads(gpu.tokens())
    body = json.dumps([overall, parts]).encode()
    assert refusal(gpu, gpu.token_evidence(body)) == "bad-signature"


@pytest.mark.parametrize("alg", ["none", "HS256", "ES256"])
def test_token_of_another_algorithm_is_refused(gpu: Gpu, alg: str) -> None:
    body = json.dumps([["JWT", gpu.token({}, alg=alg)], {}]).encode()
    assert refusal(gpu, gpu.token_evidence(body)) == "bad-signature"


def test_key_without_certificate_is_refused(gpu: Gpu) -> None:
    keys = json.dumps({"keys": [{"kid": KID, "x5c": []}]}).encode()
    assert refusal(gpu, replace_collateral(gpu.token_evidence(), "jwks", keys)) == "bad-chain"
