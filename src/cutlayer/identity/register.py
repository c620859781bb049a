"""The authority's register: every certificate granted and revoked, as durable chained lines.

It does not sign anything. One process at a time has it open.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

import msgspec

from cutlayer.errors import ConfigError, PermissionRefused, StorageError
from cutlayer.identity.certificates import MemberKind
from cutlayer.identity.keys import is_same_fingerprint
from cutlayer.identity.revocation import Reason, Revocation
from cutlayer.storage.log import DurableLog

__all__ = ["REGISTER_FILE", "Grant", "Register"]

REGISTER_FILE = "issued.jsonl"


class Grant(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One certificate."""

    name: str
    kind: MemberKind
    roles: tuple[str, ...]
    serial: str
    """Hex."""
    not_after: str
    """ISO 8601, UTC."""
    fingerprint: str
    """SHA-256 of the public key."""


class _Line(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    when: str
    event: Literal["issued", "revoked", "list"]
    grant: Grant | None = None
    serial: str | None = None
    reason: Reason | None = None
    number: int | None = None


class Register:
    """Reads and adds lines; `Register.open` is the only way to make one."""

    def __init__(self, log: DurableLog) -> None:
        self._log = log
        self._grants: dict[int, Grant] = {}
        self._revoked: dict[int, Revocation] = {}
        self._list_number = 0
        for record in log.read():
            self._take(_parse(record, log.path))

    @classmethod
    @contextmanager
    def open(cls, folder: Path) -> Iterator["Register"]:
        """Open the register of an authority's folder, alone.

        Raises:
            StorageError: in use, altered, or not writable.
        """
        with DurableLog(folder / REGISTER_FILE) as log:
            yield cls(log)

    def check_free(self, grant: Grant, now: datetime, replaces: bool) -> None:
        """Refuse a name or a key that belongs to somebody else.

        Raises:
            PermissionRefused: saying who and what to do.
        """
        for serial, revocation in self._revoked.items():
            if revocation.reason is Reason.KEY_COMPROMISE and is_same_fingerprint(
                self._grants[serial].fingerprint, grant.fingerprint
            ):
                raise PermissionRefused(
                    "the key of this request was revoked as compromised; the member needs a new key"
                )
        for other in self._valid(now):
            is_same_key = is_same_fingerprint(other.fingerprint, grant.fingerprint)
            if is_same_key and other.name != grant.name:
                raise PermissionRefused(
                    f"the key of this request belongs to {other.name} already; a member needs its "
                    "own key"
                )
            if other.name == grant.name and not is_same_key and not replaces:
                raise PermissionRefused(
                    f"{grant.name} holds a certificate with another key until {other.not_after}; "
                    "if this is the same member with a new key, approve it as a replacement, else "
                    "choose another name"
                )

    def add(self, grant: Grant, now: datetime) -> None:
        """Record a certificate before it is signed."""
        self._append(_Line(when=_iso(now), event="issued", grant=grant))

    def revoke(self, who: str | int, reason: Reason, now: datetime) -> tuple[int, ...]:
        """Record a revocation; returns the serial numbers.

        Raises:
            ConfigError: nothing valid has that name or serial number.
        """
        valid = {int(grant.serial, 16): grant for grant in self._valid(now)}
        serials = tuple(s for s, grant in valid.items() if who in (s, grant.name))
        if not serials:
            shown = f"serial number {who:x}" if isinstance(who, int) else f"name {who!r}"
            names = sorted({grant.name for grant in valid.values()})
            raise ConfigError(
                f"no valid certificate has {shown}; valid ones belong to: "
                f"{', '.join(names) or 'nobody'}"
            )
        for serial in serials:
            line = _Line(when=_iso(now), event="revoked", serial=f"{serial:x}", reason=reason)
            self._append(line)
        return serials

    def next_list_number(self, now: datetime) -> int:
        """Take the next list number; it is never given twice."""
        self._append(_Line(when=_iso(now), event="list", number=self._list_number + 1))
        return self._list_number

    def revoked(self) -> dict[int, Revocation]:
        """Every revocation, by serial number."""
        return dict(self._revoked)

    def grants(self) -> list[Grant]:
        """Every certificate ever granted, oldest first."""
        return list(self._grants.values())

    def _valid(self, now: datetime) -> list[Grant]:
        return [
            grant
            for serial, grant in self._grants.items()
            if serial not in self._revoked and datetime.fromisoformat(grant.not_after) > now
        ]

    def _append(self, line: _Line) -> None:
        self._log.append(msgspec.to_builtins(line))
        self._take(line)

    def _take(self, line: _Line) -> None:
        match line:
            case _Line(event="issued", grant=Grant() as grant):
                self._grants[int(grant.serial, 16)] = grant
            case _Line(event="revoked", serial=str() as serial, reason=Reason() as reason):
                when = datetime.fromisoformat(line.when)
                self._revoked[int(serial, 16)] = Revocation(when=when, reason=reason)
            case _Line(event="list", number=int() as number):
                self._list_number = max(self._list_number, number)
            case _:
                raise StorageError(f"{self._log.path}: a line of {line.when} is incomplete")


def _parse(record: dict[str, object], path: Path) -> _Line:
    try:
        return msgspec.convert(record, _Line)
    except msgspec.ValidationError as error:
        raise StorageError(f"{path} is not a register of certificates: {error}") from error


def _iso(moment: datetime) -> str:
    return moment.astimezone(UTC).isoformat(timespec="seconds")
