"""Evidence that an owner accepts, one piece per platform: what the rows of the table change.

Published where it is signed by real hardware, made here where a row needs the keys.
"""

from collections.abc import Callable
from functools import cache

from cutlayer.tee.evidence import Evidence, Platform
from cutlayer.tee.synthetic_quoter import SyntheticQuoter
from tests.unit.tee.authorities import AT, ec_key, issue
from tests.unit.tee.azure_worlds import AzureVm
from tests.unit.tee.evidence_samples import Sample, published, sample
from tests.unit.tee.judged_cases import Case, accepting
from tests.unit.tee.nitro_worlds import Module
from tests.unit.tee.snp_worlds import SnpChip, Wished, make_chip

__all__ = ["BASES", "DATA", "PINNED", "base", "chip", "module", "quoter", "stranger"]

PINNED = {
    "tdx": "mr_td",
    "sgx": "mr_enclave",
    "nitro": "pcr0",
    "sev-snp": "measurement",
    "azure": "measurement",
    "simulated": "mr_td",
    "tpm": "pcr4",
    "nvidia": "driver_version",
}
DATA = bytes(range(32))
"""What the made ones bind."""


@cache
def chip() -> SnpChip:
    return make_chip()


@cache
def module() -> Module:
    return Module()


@cache
def vm() -> AzureVm:
    return AzureVm(chip=chip())


@cache
def quoter() -> SyntheticQuoter:
    return SyntheticQuoter.create()


@cache
def stranger() -> bytes:
    return issue("stranger", ec_key()).pem


def _made(evidence: Evidence, root: bytes) -> Sample:
    return Sample(evidence=evidence, at=AT, roots={evidence.platform: root})


def _published_gpu() -> Sample:
    body = bytes.fromhex(published("nv/hopperAttestationReport.txt").decode())
    collateral = {"chain": published("nv/hopperCertChain.txt")}
    evidence = Evidence(platform=Platform.NVIDIA, body=body, collateral=collateral)
    return Sample(evidence=evidence, at=AT)


BASES: dict[str, Callable[[], Sample]] = {
    "published tdx": lambda: sample("published tdx"),
    "published sgx": lambda: sample("published sgx"),
    "published nitro": lambda: sample("published nitro"),
    "published sev-snp": lambda: sample("published sev-snp"),
    "sev-snp": lambda: _made(chip().evidence(Wished(report_data=DATA)), chip().ark.pem),
    "nitro": lambda: _made(module().evidence({"user_data": DATA}), module().root.pem),
    "azure": lambda: _made(vm().evidence(DATA), chip().ark.pem),
    "tpm": lambda: sample("tpm"),
    "published nvidia": _published_gpu,
    "simulated": lambda: _made(quoter().evidence(bytes(48), DATA, AT), quoter().root_pem),
}


@cache
def base(name: str) -> Case:
    """The case that each row of this base changes."""
    return accepting(BASES[name](), PINNED[name.removeprefix("published ")])
