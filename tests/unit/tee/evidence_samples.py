"""One good piece of evidence per platform, for the conformance suite; a new platform adds a line.

Made here where that is possible, else published ones, which lie beside the checkout.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cache
from pathlib import Path

import msgspec
import pytest

from cutlayer.tee.evidence import Evidence, Platform
from cutlayer.tee.quote import COLLATERAL
from cutlayer.tee.synthetic_quoter import SyntheticQuoter
from cutlayer.tee.tpm_trust import key_pem
from cutlayer.tee.verifier import Trust
from tests.tpm_worlds import quoted_tpm
from tests.unit.tee import authorities
from tests.unit.tee.azure_worlds import AzureVm
from tests.unit.tee.nitro_worlds import Module
from tests.unit.tee.nvidia_worlds import VBIOS, Gpu
from tests.unit.tee.snp_worlds import make_chip

__all__ = ["MADE", "PUBLISHED", "PUBLISHED_FOLDER", "Sample", "published", "sample"]

AT = datetime(2026, 11, 21, 12, tzinfo=UTC)
JULY_2025 = datetime(2025, 7, 1, tzinfo=UTC)
PUBLISHED_FOLDER = Path(__file__).parents[4] / "shared" / "tee_samples"


@dataclass(frozen=True, kw_only=True)
class Sample:
    """Evidence that its verifier accepts."""

    evidence: Evidence
    at: datetime
    roots: Mapping[Platform, bytes] = field(default_factory=dict)

    @property
    def trust(self) -> Trust:
        return Trust(at=self.at, roots=self.roots)


def published(name: str) -> bytes:
    """A published file; the test is skipped where they do not lie beside the checkout."""
    if not PUBLISHED_FOLDER.is_dir():
        pytest.skip("the published samples do not lie beside the checkout")
    return (PUBLISHED_FOLDER / name).read_bytes()


def _simulated(platform: Platform) -> Sample:
    quoter = SyntheticQuoter.create()
    made = quoter.evidence(bytes(48), bytes(range(32)), AT)
    evidence = msgspec.structs.replace(made, platform=platform)
    return Sample(evidence=evidence, at=AT, roots={platform: quoter.root_pem})


def _snp() -> Sample:
    chip = make_chip()
    roots = {Platform.SEV_SNP: chip.ark.pem}
    return Sample(evidence=chip.evidence(), at=authorities.AT, roots=roots)


def _snp_table() -> Sample:
    chip = make_chip()
    collateral = {"auxblob": chip.table(), "crl": authorities.revocation_list(chip.ark, [5])}
    roots = {Platform.SEV_SNP: chip.ark.pem}
    return Sample(evidence=chip.evidence(collateral=collateral), at=authorities.AT, roots=roots)


def _azure() -> Sample:
    vm = AzureVm()
    evidence = vm.evidence(nonce=bytes(range(32)))
    return Sample(evidence=evidence, at=authorities.AT, roots={Platform.AZURE: vm.chip.ark.pem})


def _made_nitro() -> Sample:
    module = Module()
    roots = {Platform.NITRO: module.root.pem}
    return Sample(evidence=module.evidence(), at=authorities.AT, roots=roots)


def _tpm() -> Sample:
    made = quoted_tpm()
    roots = {Platform.TPM: key_pem(made.key.public_key())}
    return Sample(evidence=made.evidence, at=AT, roots=roots)


def _gpu() -> Sample:
    gpu = Gpu()
    evidence = gpu.evidence(rim=gpu.manifest(), vbios_rim=gpu.manifest(VBIOS))
    return Sample(evidence=evidence, at=authorities.AT, roots={Platform.NVIDIA: gpu.root.pem})


def _gpu_tokens() -> Sample:
    gpu = Gpu()
    roots = {Platform.NVIDIA: gpu.root.pem}
    return Sample(evidence=gpu.token_evidence(), at=authorities.AT, roots=roots)


def _intel(platform: Platform, name: str) -> Sample:
    collateral = {COLLATERAL: published(f"{name}_collateral.json")}
    evidence = Evidence(platform=platform, body=published(name), collateral=collateral)
    return Sample(evidence=evidence, at=JULY_2025)


def _nitro() -> Sample:
    evidence = Evidence(platform=Platform.NITRO, body=published("nitro_2a7c16f7.cbor"))
    return Sample(evidence=evidence, at=datetime(2022, 9, 28, 15, 34, tzinfo=UTC))


def _published_gpu_tokens() -> Sample:
    collateral = {"jwks": published("nras_jwks_2026-09-12.json")}
    body = published("nras_ppcie_8xh100_2026-09-10.json")
    evidence = Evidence(platform=Platform.NVIDIA, body=body, collateral=collateral)
    return Sample(evidence=evidence, at=datetime(2026, 9, 10, 18, 30, tzinfo=UTC))


def _published_snp() -> Sample:
    collateral = {"vcek": published("kds_vcek.der"), "chain": published("milan.pem")}
    body = published("attestation.bin")
    evidence = Evidence(platform=Platform.SEV_SNP, body=body, collateral=collateral)
    return Sample(evidence=evidence, at=authorities.AT)


def _published_nvidia() -> Sample:
    body = bytes.fromhex(published("nv/hopperAttestationReport.txt").decode())
    collateral = {"chain": published("nv/hopperCertChain.txt")}
    evidence = Evidence(platform=Platform.NVIDIA, body=body, collateral=collateral)
    return Sample(evidence=evidence, at=authorities.AT)


MADE: dict[str, Callable[[], Sample]] = {
    "simulated": lambda: _simulated(Platform.SIMULATED),
    "tdx": lambda: _simulated(Platform.TDX),
    "sev-snp": _snp,
    "sev-snp with the host's table": _snp_table,
    "azure": _azure,
    "nitro": _made_nitro,
    "tpm": _tpm,
    "nvidia": _gpu,
    "nvidia tokens": _gpu_tokens,
}
"""Anywhere."""

PUBLISHED: dict[str, Callable[[], Sample]] = {
    "published tdx": lambda: _intel(Platform.TDX, "tdx_quote"),
    "published sgx": lambda: _intel(Platform.SGX, "sgx_quote"),
    "published nitro": _nitro,
    "published sev-snp": _published_snp,
    "published nvidia tokens": _published_gpu_tokens,
    "published nvidia": _published_nvidia,
}
"""Where the published samples are."""


@cache
def sample(name: str) -> Sample:
    """The sample of that name; making keys takes time, so once."""
    return (MADE | PUBLISHED)[name]()
