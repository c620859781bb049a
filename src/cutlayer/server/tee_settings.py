"""The `[tee]` section of a server's settings. It attests nothing."""

from pathlib import Path

from pydantic import Field

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
