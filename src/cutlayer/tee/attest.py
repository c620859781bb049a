"""The one way to this machine's evidence: the named source, and the files sent with it.

It verifies nothing and fetches no collateral.
"""

from pathlib import Path

import msgspec

import cutlayer.tee.attesters  # noqa: F401  (registers them)
from cutlayer.tee.attester import ATTESTERS, AttesterSettings
from cutlayer.tee.evidence import Evidence, read_limited

__all__ = ["attest", "read_collateral"]


def attest(settings: AttesterSettings, report_data: bytes) -> Evidence:
    """Fresh evidence that binds `report_data` (32 bytes, `Binding.report_data`).

    Raises:
        ConfigError: no such source, this machine is no such platform, or a file of collateral
            cannot be read.
    """
    evidence = ATTESTERS.get(settings.source).attest(settings, report_data)
    named = read_collateral(settings.collateral)
    # A named file is newer than what the source adds by itself.
    return msgspec.structs.replace(evidence, collateral={**evidence.collateral, **named})


def read_collateral(files: dict[str, Path]) -> dict[str, bytes]:
    """The files' contents by the same names.

    Raises:
        ConfigError: a file cannot be read, or is larger than any evidence.
    """
    return {name: read_limited(path, "collateral") for name, path in files.items()}
