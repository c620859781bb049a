"""A log line is on disk before append returns, and tampering is found."""

import json
import os
import resource
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cutlayer.errors import StorageError
from cutlayer.storage.log import DurableLog, locked_log, read_log
from cutlayer.storage.vault import AesVault, Vault


def _fill(path: Path, count: int = 3, vault: Vault | None = None) -> None:
    with DurableLog(path, vault) as log:
        for number in range(count):
            log.append({"event": number, "text": "ü"})


def _numbers(path: Path, vault: Vault | None = None) -> list[object]:
    return [record["event"] for record in read_log(path, vault)]


def test_records_come_back_in_order_after_reopening(tmp_path: Path) -> None:
    path = tmp_path / "log"
    _fill(path)
    with DurableLog(path) as log:
        log.append({"event": 3, "nested": {"a": [1, 2.5, None, True]}})
        records = list(log.read())
    assert [r["event"] for r in records] == [0, 1, 2, 3]
    assert records[3]["nested"] == {"a": [1, 2.5, None, True]}
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_line_is_synced_before_append_returns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[int] = []
    real = os.fdatasync
    monkeypatch.setattr(
        os, "fdatasync", lambda fd: (real(fd), synced.append(os.fstat(fd).st_size))[0]
    )
    with DurableLog(tmp_path / "log") as log:
        log.append({"event": 0})
        assert synced == [(tmp_path / "log").stat().st_size]
        log.append({"event": 1}, sync=False)
        assert len(synced) == 1
        log.sync()
        assert synced[-1] == (tmp_path / "log").stat().st_size


def test_second_writer_is_refused_until_the_first_closes(tmp_path: Path) -> None:
    path = tmp_path / "log"
    code = "import sys, pathlib; from cutlayer.storage.log import DurableLog as Log"
    code += "; Log(pathlib.Path(sys.argv[1]))"
    with DurableLog(path):
        with pytest.raises(StorageError, match="another process"):
            DurableLog(path)
        with pytest.raises(StorageError, match="another process"), locked_log(path):
            pass
        other = subprocess.run(
            [sys.executable, "-c", code, str(path)], capture_output=True, text=True
        )
        assert "another process" in other.stderr
    with locked_log(path), pytest.raises(StorageError, match="another process"):
        DurableLog(path)
    DurableLog(path).close()


@given(cut=st.integers(min_value=1, max_value=400))
def test_unfinished_last_line_is_cut_off_and_kept_aside(
    tmp_path_factory: pytest.TempPathFactory, cut: int
) -> None:
    path = tmp_path_factory.mktemp("log") / "log"
    _fill(path)
    lines = path.read_bytes().splitlines(keepends=True)
    last = lines[-1][: max(1, len(lines[-1]) - cut)]
    path.write_bytes(b"".join(lines[:-1]) + last)
    assert _numbers(path) == [0, 1]
    with DurableLog(path) as log:
        log.append({"event": "again"})
    assert _numbers(path) == [0, 1, "again"]
    assert path.with_name("log.unfinished").read_bytes() == last + b"\n"


def test_pages_lost_in_a_power_cut_count_as_unfinished(tmp_path: Path) -> None:
    path = tmp_path / "log"
    _fill(path)
    whole = path.read_bytes()
    path.write_bytes(whole + b"\0" * 4096 + b'"hash":"1"}\n')
    DurableLog(path).close()
    assert path.read_bytes() == whole


def test_lost_pages_in_the_middle_are_an_error_not_an_end(tmp_path: Path) -> None:
    path = tmp_path / "log"
    _fill(path)
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(lines[0] + b"\0" * 50 + b"\n" + lines[2])
    with pytest.raises(StorageError, match="line 2"):
        DurableLog(path)
    with pytest.raises(StorageError, match="line 2"):
        list(read_log(path))


def _edit(lines: list[bytes]) -> list[bytes]:
    return [lines[0], lines[1].replace(b'"event":1', b'"event":7'), lines[2]]


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (_edit, 2),
        (lambda lines: [*lines[:2], lines[2].replace(b'"event":2', b'"event":7')], 3),
        (lambda lines: [lines[0], lines[2]], 2),
        (lambda lines: [lines[0], lines[2], lines[1]], 2),
        (lambda lines: [*lines, lines[2]], 4),
        (lambda lines: lines[1:], 1),
        (lambda lines: [lines[0], b"garbage\n", lines[2]], 2),
        (lambda lines: [*lines, b"garbage\n"], 4),
        (lambda lines: [*lines, b"[1]\n"], 4),
        (lambda lines: [*lines, b"\xff\n"], 4),
        (lambda lines: [*lines, b"\n"], 4),
        (lambda lines: [*lines, b'{"n": 3, "record": {}}\n'], 4),
    ],
)
def test_altered_line_is_named(tmp_path: Path, change: object, line: int) -> None:
    path = tmp_path / "log"
    _fill(path)
    assert callable(change)
    altered = b"".join(change(path.read_bytes().splitlines(keepends=True)))
    path.write_bytes(altered)
    with pytest.raises(StorageError, match=f"line {line} "):
        DurableLog(path)
    assert path.read_bytes() == altered


def test_line_of_another_log_does_not_fit(tmp_path: Path) -> None:
    for name, start in (("log", 0), ("other", 5)):
        with DurableLog(tmp_path / name) as log:
            for number in range(start, start + 3):
                log.append({"event": number})
    mine, foreign = ((tmp_path / n).read_bytes().splitlines(True) for n in ("log", "other"))
    (tmp_path / "log").write_bytes(b"".join([mine[0], mine[1], foreign[2]]))
    with pytest.raises(StorageError, match="line 3 does not follow"):
        DurableLog(tmp_path / "log")


def test_anchor_finds_lines_removed_from_the_end(tmp_path: Path) -> None:
    path = tmp_path / "log"
    _fill(path)
    with DurableLog(path) as log:
        anchor = log.anchor
        log.append({"event": 3})
        log.check(anchor)
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:2]))
    with DurableLog(path) as log, pytest.raises(StorageError, match="2 lines"):
        log.check(anchor)
    path.unlink()
    _fill(path, count=5, vault=None)
    with DurableLog(path) as log:
        log.check(anchor)
    path.unlink()
    with DurableLog(path) as log:
        for _ in range(4):
            log.append({"event": "other"})
        with pytest.raises(StorageError, match="not the log"):
            log.check(anchor)


def test_encrypted_log_hides_records_and_needs_its_key(tmp_path: Path) -> None:
    path, vault = tmp_path / "log", AesVault(b"k" * 32)
    _fill(path, vault=vault)
    assert b"event" not in path.read_bytes()
    assert _numbers(path, vault) == [0, 1, 2]
    for wrong in (None, AesVault(b"w" * 32)):
        with pytest.raises(StorageError, match="key that sealed it"):
            DurableLog(path, wrong)


def test_log_that_began_in_plain_form_continues_encrypted(tmp_path: Path) -> None:
    path, vault = tmp_path / "log", AesVault(b"k" * 32)
    _fill(path)
    with DurableLog(path, vault) as log:
        log.append({"event": "secret"})
    assert _numbers(path, vault) == [0, 1, 2, "secret"]
    with pytest.raises(StorageError, match="key that sealed it"):
        DurableLog(path)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_number_that_json_cannot_hold_is_refused_and_leaves_no_trace(
    tmp_path: Path, value: float
) -> None:
    with DurableLog(tmp_path / "log") as log:
        with pytest.raises(ValueError, match="Out of range"):
            log.append({"epsilon": value})
        log.append({"event": 0})
    assert _numbers(tmp_path / "log") == [0]


def test_closed_log_refuses_to_append(tmp_path: Path) -> None:
    log = DurableLog(tmp_path / "log")
    log.close()
    log.close()
    with pytest.raises(StorageError, match="closed"):
        log.append({})


def test_failed_sync_breaks_the_log_until_it_is_reopened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(descriptor: int) -> None:
        raise OSError(5, "Input/output error")

    path = tmp_path / "log"
    with DurableLog(path) as log:
        log.append({"event": 0})
        with monkeypatch.context() as patch:
            patch.setattr(os, "fdatasync", fail)
            with pytest.raises(StorageError, match="Input/output"):
                log.append({"event": 1})
        with pytest.raises(StorageError, match="open it again"):
            log.append({"event": 2})
    with DurableLog(path) as log:
        log.append({"event": 3})
    assert _numbers(path) == [0, 3]


_LIMITED = """
import sys
from pathlib import Path
from cutlayer.errors import StorageError
from cutlayer.storage.log import DurableLog
with DurableLog(Path(sys.argv[1])) as log:
    try:
        for number in range(1000):
            log.append({"event": number})
    except StorageError as error:
        print(number, error)
"""


def test_full_disk_leaves_a_log_of_whole_lines(tmp_path: Path) -> None:
    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))

    path = tmp_path / "log"
    result = subprocess.run(
        [sys.executable, "-c", _LIMITED, str(path)],
        preexec_fn=limit,
        capture_output=True,
        text=True,
    )
    assert "free space" in result.stdout, result.stderr
    count = int(result.stdout.split()[0])
    assert _numbers(path) == list(range(count))
    assert path.read_bytes().endswith(b"\n")
    with DurableLog(path) as log:
        log.append({"event": count})
    assert not path.with_name("log.unfinished").exists()


_ENDLESS = """
import sys
from pathlib import Path
from cutlayer.storage.log import DurableLog
with DurableLog(Path(sys.argv[1])) as log:
    number = log.anchor.num_lines
    while True:
        log.append({"event": number})
        print(number, flush=True)
        number += 1
"""


def test_killed_writer_keeps_every_acknowledged_line(tmp_path: Path) -> None:
    path, acknowledged = tmp_path / "log", -1
    for delay_s in (0.0, 0.002, 0.007, 0.019):
        with subprocess.Popen(
            [sys.executable, "-c", _ENDLESS, str(path)], stdout=subprocess.PIPE
        ) as process:
            assert process.stdout is not None
            acknowledged = int(process.stdout.readline())
            time.sleep(delay_s)
            process.send_signal(signal.SIGKILL)
            numbers = process.stdout.read().split(b"\n")[:-1]
            acknowledged = int(numbers[-1]) if numbers else acknowledged
        events = _numbers(path)
        assert events == list(range(len(events)))
        assert len(events) >= acknowledged + 1


def test_lines_are_plain_json(tmp_path: Path) -> None:
    _fill(tmp_path / "log", count=1)
    entry = json.loads((tmp_path / "log").read_text())
    assert sorted(entry) == ["hash", "n", "prev", "record"]
