"""The audit log takes typed fields, never content."""

from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path

import pytest

from cutlayer.errors import StorageError
from cutlayer.storage.audit_log import AuditEntry, AuditEvent, AuditLog
from cutlayer.storage.log import read_log

_NOON = datetime(2026, 11, 21, 13, 0, tzinfo=timezone(timedelta(hours=1)))


def test_entry_is_written_with_utc_time_and_only_its_fields(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    with AuditLog(path, now=lambda: _NOON) as log:
        log.record(
            AuditEntry(
                event=AuditEvent.RUN_OPENED,
                who="mercy-hospital",
                address="ipv6:[::1]:5000",
                serial=2**120,
                spec="ab" * 32,
                bytes_up=0,
            )
        )
    assert list(read_log(path)) == [
        {
            "when": "2026-11-21T12:00:00.000+00:00",
            "event": "run_opened",
            "who": "mercy-hospital",
            "address": "ipv6:[::1]:5000",
            "serial": 2**120,
            "spec": "ab" * 32,
            "bytes_up": 0,
        }
    ]


@pytest.mark.parametrize(
    "fields",
    [
        {"who": "patient has a fever"},
        {"who": ""},
        {"who": None},
        {"who": "a\nb"},
        {"run": "x" * 201},
        {"run": b"bytes"},
        {"bytes_up": -1},
        {"bytes_up": 1.5},
        {"bytes_up": True},
        {"num_tokens": [1, 2, 3]},
        {"adapter": {"text": "secret"}},
        {"event": "anything"},
        {"error": "No space left: the patient"},
    ],
)
def test_content_cannot_be_recorded_and_is_not_repeated_in_the_error(
    fields: dict[str, object],
) -> None:
    good: dict[str, object] = {"event": AuditEvent.CONNECTED, "who": "a"}
    with pytest.raises(StorageError, match="audit field") as caught:
        AuditEntry(**{**good, **fields})  # type: ignore[arg-type]
    assert "patient" not in str(caught.value)


def test_unknown_field_and_foreign_record_are_refused(tmp_path: Path) -> None:
    with pytest.raises(TypeError):
        AuditEntry(event=AuditEvent.CONNECTED, who="a", text="secret")  # type: ignore[call-arg]
    with AuditLog(tmp_path / "log") as log, pytest.raises(StorageError, match="AuditEntry alone"):
        log.record({"text": "secret"})  # type: ignore[arg-type]


def test_entries_of_a_killed_process_are_there_without_a_flush(tmp_path: Path) -> None:
    log = AuditLog(tmp_path / "log", sync_every=100, now=lambda: datetime.now(UTC))
    log.record(AuditEntry(event=AuditEvent.STARTED, who="local"))
    assert len(list(read_log(tmp_path / "log"))) == 1
    log.close()
    log.close()


def test_altered_audit_log_is_refused_on_start(tmp_path: Path) -> None:
    path = tmp_path / "log"
    with AuditLog(path) as log:
        log.record(AuditEntry(event=AuditEvent.CONNECTED, who="mallory"))
    path.write_bytes(path.read_bytes().replace(b"mallory", b"charlie"))
    with pytest.raises(StorageError, match="line 1 was changed"):
        AuditLog(path)
