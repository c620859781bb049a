"""Evidence of a confidential VM from the kernel: `/sys/kernel/config/tsm/report` (Linux 6.7).

TDX quotes and SEV-SNP reports, by what `provider` says. It fetches no collateral: that comes from
the files of the settings, and on SNP from the host as `auxblob`.
Source: Linux, Documentation/ABI/testing/configfs-tsm-report.
"""

import os
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from cutlayer.errors import ConfigError
from cutlayer.tee.attester import ATTESTERS, AttesterSettings
from cutlayer.tee.evidence import Evidence, Platform

__all__ = ["ConfigfsTsmAttester"]

_REPORTS = "sys/kernel/config/tsm/report"
_PLATFORMS = {"tdx_guest": Platform.TDX, "sev_guest": Platform.SEV_SNP}
_MAX_ATTEMPTS = 3
_INBLOB_BYTES = 64


@ATTESTERS.register("configfs-tsm")
class ConfigfsTsmAttester:
    """A fresh folder for each request, so that two requests cannot mix."""

    def __init__(
        self,
        make: Callable[[Path], None] = os.mkdir,
        remove: Callable[[Path], None] = os.rmdir,
    ) -> None:
        """The kernel fills and empties the folders; an emulation brings its own two."""
        self._make, self._remove = make, remove

    def attest(self, settings: AttesterSettings, report_data: bytes) -> Evidence:
        """A quote or report over `report_data`, zeros after it.

        Raises:
            ConfigError: no such kernel or VM, no right to it, or the host made no report.
        """
        reports = settings.root / _REPORTS
        if not reports.is_dir():
            raise ConfigError(
                f"{reports} does not exist: this is no TDX or SEV-SNP guest with Linux 6.7 or "
                "later, or configfs is not mounted there"
            )
        for _ in range(_MAX_ATTEMPTS):
            try:
                found = self._ask(reports, report_data.ljust(_INBLOB_BYTES, b"\0"))
            except OSError as error:
                raise ConfigError(
                    f"{error.filename or reports}: {error.strerror}; the report is made for root, "
                    "with the quote generation service of the host running"
                ) from error
            if found is not None:
                return found
        raise ConfigError(f"another process writes to our folders in {reports}; no report is ours")

    def _ask(self, reports: Path, inblob: bytes) -> Evidence | None:
        """The evidence; None where somebody else wrote to the same folder meanwhile."""
        with self._folder(reports) as folder:
            before = _generation(folder)
            _write(folder / "inblob", inblob)
            body = (folder / "outblob").read_bytes()
            provider = (folder / "provider").read_text().strip()
            auxblob = _read_if_any(folder / "auxblob")
            if _generation(folder) != before + 1:
                return None
        if provider not in _PLATFORMS:
            raise ConfigError(
                f"reports of the provider {provider!r} are not known; known: "
                f"{', '.join(_PLATFORMS)}"
            )
        collateral = {"auxblob": auxblob} if auxblob else {}
        return Evidence(platform=_PLATFORMS[provider], body=body, collateral=collateral)

    @contextmanager
    def _folder(self, reports: Path) -> Iterator[Path]:
        folder = self._fresh(reports)
        try:
            yield folder
        finally:
            # A folder that stays costs the kernel a few bytes; the evidence is what matters.
            with suppress(OSError):
                self._remove(folder)

    def _fresh(self, reports: Path) -> Path:
        for _ in range(_MAX_ATTEMPTS):
            folder = reports / f"cutlayer-{secrets.token_hex(8)}"
            # Somebody else's folder is never used: its inblob is not ours.
            with suppress(FileExistsError):
                self._make(folder)
                return folder
        raise ConfigError(f"no folder in {reports} is free; is something else filling it?")


def _generation(folder: Path) -> int:
    text = (folder / "generation").read_text().strip()
    try:
        return int(text)
    except ValueError as error:
        raise ConfigError(f"{folder}/generation holds {text!r} instead of a number") from error


def _write(path: Path, data: bytes) -> None:
    # One write: the kernel takes the blob as a whole. The file exists, so it is not created.
    descriptor = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(descriptor, data)
    finally:
        os.close(descriptor)


def _read_if_any(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        # Absent on TDX; unreadable where the host gave no table. Verifiers ask for what they need.
        return b""
