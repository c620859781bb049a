"""Real TDX quotes by software, with their collateral, under a test root of one's own.

For development and tests: the production verifier accepts them only where a policy names the root,
and calls them SIMULATED; Intel's root refuses them. It protects nothing: the keys are a file.
"""

import fcntl
import hashlib
import os
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from cutlayer.storage.files import explain_os_errors, private_folder, write_atomic
from cutlayer.tee.evidence import Evidence, Platform
from cutlayer.tee.quote import COLLATERAL
from cutlayer.tee.synthetic_authority import SyntheticAuthority
from cutlayer.tee.synthetic_collateral import TcbState, raw_signature, synthetic_collateral
from cutlayer.tee.synthetic_quote import (
    QE_AUTH_DATA,
    TdFields,
    auth_data,
    qe_report,
    signed_part,
)

__all__ = ["ROOT_FILE", "Pretence", "SyntheticQuoter"]

ROOT_FILE = "root.pem"
"""In the quoter's folder: what a policy names as `roots.simulated`."""

_KEYS_FILE = "authority.json"
_VALIDITY = timedelta(days=30)
_CLOCK_SKEW = timedelta(hours=1)


@dataclass(frozen=True, kw_only=True)
class Pretence:
    """What the simulated machine claims of itself; the default is an honest production machine."""

    is_debug: bool = False
    rtmrs: tuple[bytes, bytes, bytes, bytes] = (bytes(48),) * 4
    """48 bytes each."""
    tcb: TcbState = field(default_factory=TcbState)
    collateral_age: timedelta = timedelta(0)
    """Collateral is valid for 30 days; older is expired."""


class SyntheticQuoter:
    """One simulated machine: its chip, its quoting enclave, its vendor."""

    def __init__(self, authority: SyntheticAuthority) -> None:
        self._authority = authority
        # Hardware renews it as well: it is certified by the chip's key in every quote.
        self._attestation_key = ec.generate_private_key(ec.SECP256R1())

    @classmethod
    def create(cls) -> "SyntheticQuoter":
        """A fresh one that no file remembers."""
        return cls(SyntheticAuthority.create())

    @classmethod
    def open(cls, folder: Path) -> "SyntheticQuoter":
        """The quoter of a private folder; made there when it is first opened.

        Raises:
            StorageError: the folder is open to others, or cannot be written.
            ConfigError: its file is no authority.
        """
        keys = private_folder(folder) / _KEYS_FILE
        with explain_os_errors(f"lock {folder}"):
            descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            # Two processes of one machine may start at once; one of them makes the keys.
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            if not keys.exists():
                made = SyntheticAuthority.create()
                write_atomic(folder / ROOT_FILE, made.root.pem, mode=0o644)
                made.save(keys)
            authority = SyntheticAuthority.load(keys)
        finally:
            os.close(descriptor)
        return cls(authority)

    @property
    def root_pem(self) -> bytes:
        """What a policy must name."""
        return self._authority.root.pem

    def evidence(
        self, mr_td: bytes, report_data: bytes, at: datetime, pretence: Pretence | None = None
    ) -> Evidence:
        """A quote with its collateral.

        Args:
            mr_td: measurement to claim, 48 bytes.
            report_data: what it binds, at most 64 bytes; zeros follow.
            at: time of the collateral, UTC.
            pretence: what else the machine claims.
        """
        chosen = pretence or Pretence()
        fields = TdFields(
            mr_td=mr_td,
            report_data=report_data.ljust(64, b"\0"),
            rtmrs=chosen.rtmrs,
            is_debug=chosen.is_debug,
        )
        start = at - chosen.collateral_age - _CLOCK_SKEW
        collateral = synthetic_collateral(self._authority, chosen.tcb, start, start + _VALIDITY)
        return Evidence(
            platform=Platform.SIMULATED,
            body=self.quote(fields),
            collateral={COLLATERAL: collateral},
        )

    def quote(self, fields: TdFields) -> bytes:
        """A quote without collateral."""
        part = signed_part(fields)
        point = self._attestation_key.public_key().public_bytes(
            Encoding.X962, PublicFormat.UncompressedPoint
        )
        key = point[1:]
        report = qe_report(hashlib.sha256(key + QE_AUTH_DATA).digest())
        return part + auth_data(
            raw_signature(self._attestation_key, part),
            key,
            report,
            raw_signature(self._authority.pck.key, report),
            self._authority.pck_chain_pem,
        )
