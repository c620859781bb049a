"""Who may be connected now: reads certificates for the listener and remembers their ends.

It does not close connections: the listener asks again and again.
"""

import threading
from collections.abc import Callable
from datetime import UTC, datetime

from cutlayer.errors import PermissionRefused
from cutlayer.identity.certificates import Identity, identify
from cutlayer.identity.revocation import RevocationList

__all__ = ["Admission"]


class Admission:
    """Revocation and expiry, effective on open connections too. Thread-safe."""

    def __init__(
        self,
        revocations: RevocationList | None,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        """Judge by a list; None knows expiry alone."""
        self._revocations, self._now = revocations, now
        self._lock = threading.Lock()
        self._ends: dict[int, datetime] = {}

    def identify(self, pem: bytes, address: str = "") -> Identity:
        """Read a certificate whose chain TLS has verified.

        Raises:
            PermissionRefused: not one of ours, expired, or revoked.
        """
        holder = identify(pem, address)
        with self._lock:
            self._ends[holder.serial] = holder.not_after
        if not self.is_allowed(holder.serial):
            raise PermissionRefused(
                f"the certificate of {holder.name} (serial {holder.serial:x}) is revoked or has "
                "expired; ask the federation's owner"
            )
        return holder

    def is_allowed(self, serial: int | None) -> bool:
        """Whether a certificate that was identified is neither expired nor revoked now.

        Args:
            serial: its serial number; None is a peer without certificate, which only a plaintext
                loopback listener lets in.
        """
        if serial is None:
            return True
        end = self._ends.get(serial)
        if end is None or end < self._now():
            return False
        return self._revocations is None or not self._revocations.is_revoked(serial)
