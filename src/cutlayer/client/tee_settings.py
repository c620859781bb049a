"""The `[tee]` section of a client's settings. It verifies nothing."""

from pathlib import Path

from pydantic import Field

from cutlayer.settings import Settings
from cutlayer.tee.attester import AttesterSettings

__all__ = ["ClientTeeSettings"]


class ClientTeeSettings(Settings):
    """What the trunk must prove before anything leaves; docs/attested-channel.md."""

    policy: Path
    """What is accepted: a file made by `cutlayer attest policy init` and signed off by somebody."""
    required: bool = True
    """Without accepted evidence not one tensor leaves. False goes on with a server that shows none,
    over plain mutual TLS; evidence that is shown and refused stops it all the same."""
    reattest_s: float = Field(default=300.0, gt=0)
    """Seconds after which the server must prove anew before the next call; rounds of a federation
    ask at their begin too."""
    attester: AttesterSettings | None = None
    """Where this side's own evidence comes from, for servers that want it."""
    adapter_key_file: Path | None = None
    """Key (64 hex digits, mode 0600) that seals this owner's adapters at the server; released to it
    once it is accepted. None leaves that to the server's own key."""
