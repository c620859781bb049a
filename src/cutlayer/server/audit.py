"""The server's audit log as its connections write it: who, when, what; never content.

It does not decide anything; threads of several connections may call it.
"""

import threading

from cutlayer.storage.audit_log import AuditEntry, AuditEvent, AuditLog
from cutlayer.wire.channel import Peer

__all__ = ["Audit"]


class Audit:
    """A thread-safe writer that fills in the peer."""

    def __init__(self, log: AuditLog) -> None:
        self._log = log
        self._lock = threading.Lock()
        self._is_closed = False

    def record(
        self,
        event: AuditEvent,
        peer: Peer | None = None,
        *,
        spec: str | None = None,
        run: str | None = None,
        step: int | None = None,
        error: str | None = None,
        assurance: str | None = None,
    ) -> None:
        """Append one entry; without a peer it is the operator's. After `close` nothing is kept."""
        entry = AuditEntry(
            event=event,
            who="local" if peer is None else peer.name,
            address=None if peer is None else peer.address,
            serial=None if peer is None else peer.serial,
            spec=spec,
            run=run,
            step=step,
            error=error,
            assurance=assurance,
        )
        with self._lock:
            # A connection may notice after the log has ended that its peer is gone.
            if not self._is_closed:
                self._log.record(entry)

    def close(self) -> None:
        """Flush and close the file."""
        with self._lock:
            self._is_closed = True
            self._log.close()
