"""NVIDIA's own reference manifests against NVIDIA's own reports, as one of its packages ships them.

Downloaded where a package index can be reached; the manifests' certificates ran out in 2025.
"""

from datetime import UTC, datetime
from functools import partial

import pytest

from cutlayer.errors import AttestationError
from cutlayer.tee.claims import Claims
from cutlayer.tee.evidence import Evidence, Platform
from cutlayer.tee.rim import verify_rim
from cutlayer.tee.verifier import Trust
from cutlayer.tee.verifiers.nvidia import NVIDIA_ROOTS
from cutlayer.tee.verify import claims_of
from tests.unit.tee.evidence_samples import published
from tests.unit.tee.public_packages import gpu_samples

JUNE_2024 = datetime(2024, 6, 1, tzinfo=UTC)
IN_2026 = datetime(2026, 5, 1, tzinfo=UTC)
SDK = "nv/sample_attestation_data_gpu_hopper"


@pytest.fixture(scope="module")
def files(pytestconfig: pytest.Config) -> dict[str, bytes]:
    cache = pytestconfig.cache
    assert cache is not None
    return gpu_samples(cache.mkdir("evidence"))


def judged(report: bytes, chain: bytes, at: datetime = JUNE_2024, **manifests: bytes) -> Claims:
    collateral = {"chain": chain, **manifests}
    evidence = Evidence(platform=Platform.NVIDIA, body=report, collateral=collateral)
    return claims_of(evidence, Trust(at=at))


def test_every_shipped_manifest_is_signed_by_nvidia(files: dict[str, bytes]) -> None:
    manifests = {name: data for name, data in files.items() if name.endswith(".swidtag")}
    assert len(manifests) > 20
    for name, data in manifests.items():
        rim = verify_rim(data, list(NVIDIA_ROOTS), JUNE_2024)
        assert rim.product == "GH100"
        digits = rim.version.replace(".", "")
        assert digits in name or name == "Driver_RIM_test_no_gpu.swidtag"
        assert len(rim.golden) in (12, 21)


def test_shipped_manifest_has_run_out(files: dict[str, bytes]) -> None:
    with pytest.raises(AttestationError, match="expired"):
        verify_rim(files["Driver_RIM_test_no_gpu.swidtag"], list(NVIDIA_ROOTS), IN_2026)


def test_shipped_report_holds_and_shipped_manifests_are_of_other_firmware(
    files: dict[str, bytes],
) -> None:
    judge = partial(judged, files["hopperAttestationReport.txt"], files["hopperCertChain.txt"])
    claims = judge(at=IN_2026)
    assert (claims.details["driver"], claims.details["vbios"]) == ("550.90.07", "96.00.9F.00.01")
    for name, data in files.items():
        if name.endswith(".swidtag"):
            with pytest.raises(AttestationError, match="wrong-measurement"):
                judge(vbios_rim=data)


def test_published_report_measures_what_its_vbios_manifest_says(files: dict[str, bytes]) -> None:
    # Report and manifest come from two publications: what NVIDIA signed is what the GPU measured.
    report = published(f"{SDK}AttestationReport.txt")
    judge = partial(judged, report, published(f"{SDK}CertChain.txt"))
    assert judge().details["vbios"] == "96.00.5E.00.01"
    assert judge(vbios_rim=files["1010_0200_882_96005E0001_PROD.swidtag"]).chip is not None
    # The same measurements under another version number: the manifest is of another VBIOS.
    with pytest.raises(AttestationError, match=r"wrong-measurement.*96\.00\.5E\.00\.03"):
        judge(vbios_rim=files["1010_0200_882_96005E0003_PROD.swidtag"])
