"""The `[tee]` section of a server's settings. It attests nothing."""

from pathlib import Path
from typing import Self

from pydantic import Field, model_validator

from cutlayer.settings import Settings
from cutlayer.tee.attester import AttesterSettings

__all__ = ["ServerTeeSettings"]


class ServerTeeSettings(Settings):
    """What this server proves, and what it wants proved; docs/attested-channel.md."""

    attester: AttesterSettings
    """Where its evidence comes from."""
    client_policy: Path | None = None
    """Policy that clients' evidence must satisfy before any call; None asks clients for none."""
    client_reattest_s: float = Field(default=900.0, gt=0)
    """Seconds for which a client's evidence counts; keep it above the clients' `tee.reattest_s`."""
    key_folder: Path | None = None
    """Folder with NAME.key files (64 hex digits, mode 0600), released to attested clients."""

    @model_validator(mode="after")
    def _knows_whom_to_trust(self) -> Self:
        if self.key_folder is not None and self.client_policy is None:
            raise ValueError("key_folder needs client_policy: keys are for attested clients alone")
        return self
