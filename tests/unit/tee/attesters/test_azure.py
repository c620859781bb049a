"""A software TPM laid out as Azure's paravisor leaves one: report in NV, key at its handle."""

import subprocess
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
from cryptography.hazmat.primitives.asymmetric import rsa

from cutlayer.errors import AttestationError, ConfigError
from cutlayer.tee.attester import AttesterSettings
from cutlayer.tee.attesters.azure import AK_HANDLE, REPORT_INDEX, AzureAttester
from cutlayer.tee.evidence import Evidence, Platform
from cutlayer.tee.tpm_device import TpmDevice
from cutlayer.tee.tpm_keys import parse_public
from cutlayer.tee.verifier import Trust
from cutlayer.tee.verify import claims_of
from tests.tpm_worlds import extend, software_tpm
from tests.unit.tee.authorities import AT
from tests.unit.tee.azure_worlds import AzureVm

pytestmark = pytest.mark.system

NONCE = bytes(range(32))
SETTINGS = AttesterSettings(source="azure")
ATTRIBUTES = "fixedtpm|fixedparent|sensitivedataorigin|userwithauth|restricted|sign"


@pytest.fixture(scope="module")
def device() -> Iterator[TpmDevice]:
    with software_tpm() as device:
        yield device


@pytest.fixture(scope="module")
def vm() -> AzureVm:
    return AzureVm()


@pytest.fixture(scope="module")
def paravisor(device: TpmDevice, vm: AzureVm, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Key and report, as they are found on Azure after boot."""
    folder = tmp_path_factory.mktemp("paravisor")
    kind = ["-G", "rsa2048:rsassa-sha256:null", "-g", "sha256", "-a", ATTRIBUTES]
    tools(device, folder, "tpm2_createprimary", "-C", "o", *kind, "-c", "made.ctx")
    tools(device, folder, "tpm2_evictcontrol", "-C", "o", "-c", "made.ctx", AK_HANDLE)
    tools(device, folder, "tpm2_flushcontext", "-t")
    tools(device, folder, "tpm2_readpublic", "-c", AK_HANDLE, "-f", "tss", "-o", "ak")
    key = parse_public((folder / "ak").read_bytes()).key
    assert isinstance(key, rsa.RSAPublicKey)
    report = vm.report(vm.runtime(key=key))
    (folder / "report").write_bytes(report)
    index = [REPORT_INDEX, "-C", "o", "-s", str(len(report)), "-a", "ownerread|ownerwrite"]
    tools(device, folder, "tpm2_nvdefine", *index)
    tools(device, folder, "tpm2_nvwrite", REPORT_INDEX, "-C", "o", "-i", "report")


def tools(device: TpmDevice, folder: Path, *command: str) -> None:
    wired = [command[0], "-T", device.tcti, *command[1:]]
    subprocess.run(wired, cwd=folder, check=True, capture_output=True)


def evidence_of(vm: AzureVm, nonce: bytes) -> Evidence:
    found = AzureAttester().attest(SETTINGS, nonce)
    # The settings' files of collateral, which `tee.attest` adds.
    return msgspec.structs.replace(found, collateral=found.collateral | vm.chip.collateral)


def test_paravisor_report_and_live_quote_make_one_verdict(
    device: TpmDevice, paravisor: None, vm: AzureVm, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TPM2TOOLS_TCTI", device.tcti)
    trust = Trust(at=AT, roots={Platform.AZURE: vm.chip.ark.pem})
    before = claims_of(evidence_of(vm, NONCE), trust)
    assert before.report_data == NONCE
    assert before.measurements["measurement"] == "5a" * 48
    extend(device, 4)
    after = claims_of(evidence_of(vm, NONCE), trust)
    assert after.measurements["pcr4"] != before.measurements["pcr4"]
    assert after.measurements["pcr5"] == before.measurements["pcr5"]


def test_a_report_of_another_vm_does_not_take_this_ones_quote(
    device: TpmDevice, paravisor: None, vm: AzureVm, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TPM2TOOLS_TCTI", device.tcti)
    stolen = msgspec.structs.replace(evidence_of(vm, NONCE), body=vm.report(vm.runtime()))
    with pytest.raises(AttestationError) as caught:
        claims_of(stolen, Trust(at=AT, roots={Platform.AZURE: vm.chip.ark.pem}))
    assert caught.value.refusal == "wrong-root"


def test_a_tpm_without_a_paravisor_is_no_source(monkeypatch: pytest.MonkeyPatch) -> None:
    with software_tpm() as empty:
        monkeypatch.setenv("TPM2TOOLS_TCTI", empty.tcti)
        with pytest.raises(ConfigError, match="tpm2_readpublic"):
            AzureAttester().attest(SETTINGS, NONCE)


def test_a_machine_without_a_tpm_is_no_source(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TPM2TOOLS_TCTI", raising=False)
    with pytest.raises(ConfigError, match=r"no TPM 2\.0"):
        AzureAttester().attest(AttesterSettings(source="azure", root=tmp_path), NONCE)
