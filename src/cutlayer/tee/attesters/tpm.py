"""TPM 2.0 of this machine as a source of evidence.

Which TPM: `TPM2TOOLS_TCTI` where it is set, else `dev/tpmrm0` under the root. A file
`ak_certificate.pem` in the source's folder goes along. It activates no key (`tpm_activation`).
"""

from pathlib import Path

from cutlayer.errors import ConfigError
from cutlayer.tee.attester import ATTESTERS, AttesterSettings
from cutlayer.tee.evidence import Evidence, Platform
from cutlayer.tee.tpm_device import find_tpm

__all__ = ["TpmAttester"]


@ATTESTERS.register("tpm")
class TpmAttester:
    """Quotes PCRs 0 to 15 of the SHA-256 bank."""

    def attest(self, settings: AttesterSettings, report_data: bytes) -> Evidence:
        """A fresh quote with the report data as its nonce.

        Raises:
            ConfigError: no TPM, no tpm2-tools, or the TPM refused.
        """
        device = find_tpm(settings)
        quote = device.quote(report_data)
        collateral = {
            "signature": quote.signature,
            "ak": device.attestation_key(),
            "pcrs": quote.pcrs,
        }
        if settings.folder is not None:
            collateral |= _certificate(settings.folder / "ak_certificate.pem")
        return Evidence(platform=Platform.TPM, body=quote.message, collateral=collateral)


def _certificate(path: Path) -> dict[str, bytes]:
    if not path.exists():
        return {}
    try:
        return {"ak_certificate": path.read_bytes()}
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error
