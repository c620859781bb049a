"""Evidence of an Azure confidential VM: the paravisor's report, and a quote by its virtual TPM.

It fetches nothing: the hardware's certificates (SEV-SNP: `vcek`, `chain`; TDX: `td_quote` over the
TDREPORT, and `intel`) are files of the settings. Tested on a TPM in software, never on Azure.
"""

from pathlib import Path

from cutlayer.tee.attester import ATTESTERS, AttesterSettings
from cutlayer.tee.evidence import Evidence, Platform
from cutlayer.tee.tpm_device import TpmDevice, find_tpm

__all__ = ["AK_HANDLE", "REPORT_INDEX", "AzureAttester"]

REPORT_INDEX = "0x01400001"
"""NV index in which the paravisor leaves its report."""
AK_HANDLE = "0x81000003"
"""Persistent handle of the attestation key that the report names."""


class _ParavisorTpm(TpmDevice):
    """A virtual TPM whose attestation key the paravisor made, not we."""

    def report(self) -> bytes:
        """What lies in the report's index."""
        with self._work() as work:
            self._run(work, "tpm2_nvread", "-C", "o", REPORT_INDEX, "-o", "report")
            return (work / "report").read_bytes()

    def _load_ak(self, work: Path) -> None:
        # A serialised handle serves the tools as a loaded context does.
        self._run(work, "tpm2_readpublic", "-Q", "-c", AK_HANDLE, "-t", "ak.ctx")


@ATTESTERS.register("azure")
class AzureAttester:
    """Report, and a quote over PCRs 0 to 15 with the report data as its nonce."""

    def attest(self, settings: AttesterSettings, report_data: bytes) -> Evidence:
        """A fresh quote beside the report that was made at boot.

        Raises:
            ConfigError: no virtual TPM, no report in it, or no tpm2-tools.
        """
        device = _ParavisorTpm(find_tpm(settings).tcti)
        quote = device.quote(report_data)
        collateral = {
            "quote": quote.message,
            "signature": quote.signature,
            "ak": device.attestation_key(),
            "pcrs": quote.pcrs,
        }
        return Evidence(platform=Platform.AZURE, body=device.report(), collateral=collateral)
