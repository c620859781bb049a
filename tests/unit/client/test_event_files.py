"""Event files: what TensorBoard would read in them, and who else may read them."""

import os
import stat
import struct
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.record_writer import masked_crc32c

from cutlayer.client.event_files import EventFiles
from cutlayer.client.run_state import StepRecord
from cutlayer.client.train import Report
from cutlayer.errors import ConfigError, StorageError

Scalars = dict[tuple[str, int], float]


@dataclass
class Clock:
    """Wall time that a test moves."""

    now_s: float = 1_700_000_000.0

    def __call__(self) -> float:
        return self.now_s


@dataclass
class Traffic:
    """Bytes that a test counts."""

    bytes_sent: int = 1000
    bytes_received: int = 500


def report(step: int, loss: float = 2.0, validation_loss: float | None = None) -> Report:
    record = StepRecord(step=step, loss=loss, num_tokens=30, num_scored=10, grad_norm=0.5, lr=0.25)
    return Report(record=record, num_steps=9, validation_loss=validation_loss)


def records(path: Path) -> Iterator[Event]:
    """Every event of a file, both checksums of each record checked."""
    data = path.read_bytes()
    while data:
        length, length_crc = struct.unpack("<QI", data[:12])
        assert masked_crc32c(data[:8]) == length_crc
        body, (body_crc,) = data[12 : 12 + length], struct.unpack("<I", data[12 + length :][:4])
        assert masked_crc32c(body) == body_crc
        yield Event.FromString(body)
        data = data[16 + length :]


def events_of(folder: Path) -> list[Event]:
    """Of all files, in TensorBoard's order."""
    return [event for path in sorted(folder.iterdir()) for event in records(path)]


def scalars(folder: Path) -> Scalars:
    """As TensorBoard shows them: a restart makes it forget that step and all later ones."""
    shown: Scalars = {}
    for event in events_of(folder):
        if event.session_log.status == SessionLog.START:
            shown = {key: value for key, value in shown.items() if key[1] < event.step}
        for value in event.summary.value:
            shown[value.tag, event.step] = value.simple_value
    return shown


def test_every_number_of_a_step_can_be_read_back(tmp_path: Path) -> None:
    clock, traffic = Clock(), Traffic()
    with EventFiles(tmp_path / "events", traffic, clock=clock) as files:
        clock.now_s += 2.0
        traffic.bytes_sent += 70
        files.step(report(1))
        clock.now_s += 3.0
        traffic.bytes_received += 20
        files.step(report(2, loss=1.5, validation_loss=1.25))
    assert scalars(tmp_path / "events") == {
        ("train/loss", 1): 2.0,
        ("train/grad_norm", 1): 0.5,
        ("train/lr", 1): 0.25,
        ("train/tokens_per_s", 1): 15.0,
        ("wire/bytes_up", 1): 70.0,
        ("wire/bytes_down", 1): 0.0,
        ("train/loss", 2): 1.5,
        ("train/grad_norm", 2): 0.5,
        ("train/lr", 2): 0.25,
        ("train/tokens_per_s", 2): 10.0,
        ("validation/loss", 2): 1.25,
        ("wire/bytes_up", 2): 0.0,
        ("wire/bytes_down", 2): 20.0,
    }
    first, *others = events_of(tmp_path / "events")
    assert first.file_version == "brain.Event:2"
    assert [event.wall_time for event in others][-1] == clock.now_s


def test_rounds_have_their_own_axis(tmp_path: Path) -> None:
    traffic = Traffic()
    with EventFiles(tmp_path / "events", traffic, steps_per_round=2) as files:
        for step, loss in enumerate((4.0, 2.0, 1.0), start=1):
            traffic.bytes_sent += 5
            files.step(report(step, loss))
    rounds = {k: v for k, v in scalars(tmp_path / "events").items() if k[0].startswith("round/")}
    assert rounds == {
        ("round/loss", 1): 3.0,
        ("round/bytes_up", 1): 10.0,
        ("round/bytes_down", 1): 0.0,
    }


def test_steps_that_were_lost_are_shown_once_as_they_were_learnt_at_last(tmp_path: Path) -> None:
    clock = Clock()
    with EventFiles(tmp_path / "events", clock=clock) as files:
        for step, loss in ((1, 9.0), (2, 8.0), (3, 7.0), (2, 6.0)):
            files.step(report(step, loss))
    losses = {step: v for (tag, step), v in scalars(tmp_path / "events").items() if "loss" in tag}
    assert losses == {1: 9.0, 2: 6.0}
    clock.now_s += 0.5
    # Another process goes on from the saved step 1.
    with EventFiles(tmp_path / "events", clock=clock) as files:
        files.step(report(2, 5.0))
    losses = {step: v for (tag, step), v in scalars(tmp_path / "events").items() if "loss" in tag}
    assert losses == {1: 9.0, 2: 5.0}


def test_nobody_else_may_read_the_files(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        EventFiles(tmp_path / "events").close()
    finally:
        os.umask(before)
    folder = tmp_path / "events"
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert [stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()] == [0o600]


def test_folder_that_is_open_to_others_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "events"
    folder.mkdir()
    folder.chmod(0o755)
    with pytest.raises(StorageError, match="700"):
        EventFiles(folder)


def test_steps_reach_the_disk_before_the_end(tmp_path: Path) -> None:
    clock = Clock()
    files = EventFiles(tmp_path / "events", clock=clock)
    clock.now_s += 60.0
    files.step(report(1))
    assert ("train/loss", 1) in scalars(tmp_path / "events")
    files.close()


def test_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith("tensorboardX")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    with pytest.raises(ConfigError, match=r"pip install cutlayer\[tensorboard\]"):
        EventFiles(tmp_path / "events")
    assert not (tmp_path / "events").exists()
