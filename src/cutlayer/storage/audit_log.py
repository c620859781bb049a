"""Who did what, when, under which spec and adapter, and how many bytes: never content.

It does not decide or count; client and server record here. Every field is typed and narrow: a
name, a digest or an identifier without spaces, or a whole number. There is no free text, so no
prompt, token or tensor can be written by mistake. Lines are chained (`log`) and reach the kernel at
once, so a killed process loses none; they are synced together, every `sync_every` entries and at
`flush` and `close`, so a power cut may lose the last `sync_every` - 1.
"""

import re
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from types import TracebackType

from cutlayer.errors import StorageError
from cutlayer.storage.log import DurableLog

__all__ = ["AuditEntry", "AuditEvent", "AuditLog"]

_WORD = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:@/+\[\]=%-]{0,199}")


class AuditEvent(StrEnum):
    """What can happen, on either side."""

    STARTED = "started"
    STOPPED = "stopped"
    CONNECTED = "connected"
    DISCONNECTED = "disconnected"
    REFUSED = "refused"
    RUN_OPENED = "run_opened"
    RUN_SAVED = "run_saved"
    RUN_FINISHED = "run_finished"
    RUN_PURGED = "run_purged"
    EVALUATED = "evaluated"
    ADAPTER_PULLED = "adapter_pulled"
    ADAPTER_EXPORTED = "adapter_exported"
    SESSION_OPENED = "session_opened"
    SESSION_CLOSED = "session_closed"
    CERTIFICATE_REVOKED = "certificate_revoked"
    REVOCATIONS_LOADED = "revocations_loaded"
    SETTINGS_CHANGED = "settings_changed"
    ATTESTED = "attested"
    KEY_TAKEN = "key_taken"


@dataclass(frozen=True, kw_only=True)
class AuditEntry:
    """One line. None means that the field does not apply."""

    event: AuditEvent
    """What happened."""
    who: str
    """Name in the certificate of whoever caused it; "local" for the operator of this machine."""
    address: str | None = None
    """Network address of the peer."""
    serial: int | None = None
    """Certificate serial number."""
    spec: str | None = None
    """Digest of the agreed spec."""
    run: str | None = None
    """Run identifier."""
    adapter: str | None = None
    """Adapter name or digest."""
    session: str | None = None
    """Session identifier."""
    step: int | None = None
    """Training step."""
    num_tokens: int | None = None
    """Tokens processed."""
    bytes_up: int | None = None
    """Bytes from client to server."""
    bytes_down: int | None = None
    """Bytes from server to client."""
    error: str | None = None
    """Name of the error class, for refusals; never its message."""
    assurance: str | None = None
    """What accepted evidence is worth (`tee.assurance`)."""
    policy: str | None = None
    """Digest of the policy that accepted it."""

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            _check_field(name, value)


class AuditLog:
    """Append-only; one process writes it."""

    def __init__(
        self,
        path: Path,
        sync_every: int = 32,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        """Open or create.

        Args:
            path: the file, mode 0600.
            sync_every: entries per disk sync; 1 makes every entry durable at once.
            now: the clock, timezone-aware.

        Raises:
            StorageError: locked by another process, altered, or not writable.
        """
        self._log = DurableLog(path)
        self._sync_every = max(1, sync_every)
        self._num_unsynced = 0
        self._now = now

    def __enter__(self) -> "AuditLog":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def record(self, entry: AuditEntry) -> None:
        """Append one entry with the time.

        Raises:
            StorageError: not an AuditEntry, or the file cannot be written.
        """
        if not isinstance(entry, AuditEntry):
            raise StorageError(f"the audit log takes AuditEntry alone, got {type(entry).__name__}")
        when = self._now().astimezone(UTC).isoformat(timespec="milliseconds")
        fields = {name: value for name, value in asdict(entry).items() if value is not None}
        self._log.append({"when": when, **fields}, sync=False)
        self._num_unsynced += 1
        if self._num_unsynced >= self._sync_every:
            self.flush()

    def flush(self) -> None:
        """Put every entry on disk."""
        self._log.sync()
        self._num_unsynced = 0

    def close(self) -> None:
        """Flush and release the file; a second call does nothing."""
        if self._num_unsynced:
            self.flush()
        self._log.close()


def _check_field(name: str, value: object) -> None:
    if value is None and name not in {"event", "who"}:
        return
    if name == "event":
        is_right = isinstance(value, AuditEvent)
    elif AuditEntry.__annotations__[name] == int | None:
        is_right = isinstance(value, int) and not isinstance(value, bool) and value >= 0
    else:
        is_right = isinstance(value, str) and _WORD.fullmatch(value) is not None
    if not is_right:
        # The refused value may be content: name its type, never the value.
        raise StorageError(
            f"audit field {name} takes an identifier or a whole number without spaces, "
            f"not this {type(value).__name__}"
        )
