"""Evidence of an SGX enclave under Gramine: two files of its own file system.

Collateral comes from the files of the settings: an enclave asks no network.
Source: Gramine, Attestation and Secret Provisioning, `/dev/attestation`.
"""

import threading
from pathlib import Path

from cutlayer.errors import ConfigError
from cutlayer.tee.attester import ATTESTERS, AttesterSettings
from cutlayer.tee.evidence import Evidence, Platform

__all__ = ["GramineAttester"]

_FOLDER = "dev/attestation"
_REPORT_DATA_BYTES = 64


@ATTESTERS.register("gramine")
class GramineAttester:
    """DCAP quotes; Gramine's files serve one request at a time, hence the lock."""

    def __init__(self) -> None:
        self._lock = threading.Lock()

    def attest(self, settings: AttesterSettings, report_data: bytes) -> Evidence:
        """A quote over `report_data`, zeros after it.

        Raises:
            ConfigError: this process is no Gramine enclave, or it was built without DCAP.
        """
        folder = settings.root / _FOLDER
        try:
            with self._lock:
                _check_kind(folder)
                path = folder / "user_report_data"
                path.write_bytes(report_data.ljust(_REPORT_DATA_BYTES, b"\0"))
                body = (folder / "quote").read_bytes()
        except OSError as error:
            raise ConfigError(
                f"{error.filename or folder}: {error.strerror}; Gramine shows it within an "
                "enclave whose manifest has sgx.remote_attestation = 'dcap'"
            ) from error
        return Evidence(platform=Platform.SGX, body=body)


def _check_kind(folder: Path) -> None:
    kind = (folder / "attestation_type").read_text().strip()
    if kind != "dcap":
        raise ConfigError(
            f"this enclave's attestation type is {kind!r}; build it with "
            "sgx.remote_attestation = 'dcap'"
        )
