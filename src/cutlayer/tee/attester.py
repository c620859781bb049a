"""Where evidence comes from: the registry of attesters, one class per source.

It verifies nothing. A new source is a class under `@ATTESTERS.register` in `tee/attesters/`.
"""

from pathlib import Path
from typing import Protocol

from pydantic import Field

from cutlayer.registry import Registry
from cutlayer.settings import Settings
from cutlayer.tee.evidence import Evidence

__all__ = ["ATTESTERS", "Attester", "AttesterSettings"]


class AttesterSettings(Settings):
    """Where this machine's evidence comes from."""

    source: str
    """Registered name: simulated, configfs-tsm, gramine, nitro, tpm, dstack."""
    root: Path = Path("/")
    """Folder under which the source's own paths are looked up; tests emulate them here."""
    folder: Path | None = None
    """What the source keeps: the simulated quoter's keys, the TPM's attestation key."""
    collateral: dict[str, Path] = Field(default_factory=dict)
    """Files that are sent with the evidence, by the verifier's names (`intel`: Intel's TCB info
    and revocation lists). Read each time: replace them before they expire."""


class Attester(Protocol):
    """Asks the platform for evidence."""

    def attest(self, settings: AttesterSettings, report_data: bytes) -> Evidence:
        """Fresh evidence that binds `report_data` (32 bytes).

        Raises:
            ConfigError: this machine is no such platform; says what is missing.
        """


ATTESTERS: Registry[Attester] = Registry("attestation source")
"""By the name in the settings."""
