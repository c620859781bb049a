"""The one way to this machine's evidence: the source that the settings name. Verifies nothing."""

import cutlayer.tee.attesters  # noqa: F401  (registers them)
from cutlayer.tee.attester import ATTESTERS, AttesterSettings
from cutlayer.tee.evidence import Evidence

__all__ = ["attest"]


def attest(settings: AttesterSettings, report_data: bytes) -> Evidence:
    """Fresh evidence that binds `report_data` (32 bytes, `Binding.report_data`).

    Raises:
        ConfigError: no such source, or this machine is no such platform.
    """
    return ATTESTERS.get(settings.source).attest(settings, report_data)
