"""One file of frames: as they crossed, cut short, damaged."""

import resource
import stat
import threading
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_channel import PEER, Doubler, step
from wire_samples import sample_frames

from cutlayer.errors import CacheFull, CutlayerError, ProtocolError, StorageError
from cutlayer.wire import codec
from cutlayer.wire.channel import LoopbackChannel
from cutlayer.wire.frame import FrameLimits, frame_bytes
from cutlayer.wire.messages import Kind
from cutlayer.wire.recorder import Recorder
from cutlayer.wire.recording import (
    ENTRY,
    Direction,
    RecordedFrame,
    RecordingHeader,
    open_recording,
    prelude_of,
)

HEADER = RecordingHeader(
    software="cutlayer test",
    spec={"model_type": "llama", "lower": 1},
    leaves={"embedding": "ab" * 32},
    rules={"mechanism": "gaussian", "scale": 0.02, "clip": None},
)


def recorded(path: Path, num_calls: int = 3) -> list[RecordedFrame]:
    recorder = Recorder(path, HEADER)
    channel = recorder.channel(LoopbackChannel(Doubler(), PEER))
    for number in range(num_calls):
        channel.call(step(x=torch.full((1, 4), float(number)))).result(0)
    recorder.close()
    return list(open_recording(path).frames())


def test_a_recording_holds_each_frame_in_order(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path / "r", HEADER)
    channel = recorder.channel(LoopbackChannel(Doubler(), PEER))
    for number in range(3):
        channel.call(step(x=torch.full((1, 4), float(number)))).result(0)
    with pytest.raises(CacheFull):
        channel.call(step("full")).result(0)
    recorder.close()
    recording = open_recording(tmp_path / "r")
    frames = list(recording.frames())
    assert (recording.header, recording.num_frames, recording.is_whole) == (HEADER, 8, True)
    assert [item.number for item in frames] == list(range(1, 9))
    assert [item.is_sent for item in frames] == [True, False] * 4
    assert [item.frame.call_id for item in frames] == [1, 1, 2, 2, 3, 3, 4, 4]
    assert codec.decode(frames[4].frame.tensors["h"]).tolist() == [[2.0] * 4]
    assert codec.decode(frames[5].frame.tensors["y"]).tolist() == [[4.0] * 4]
    assert frames[7].frame.kind is Kind.FAILED
    times = [item.time_s for item in frames]
    assert times == sorted(times)
    assert channel.bytes_sent == sum(frame_bytes(item.frame) for item in frames if item.is_sent)


def test_connections_of_one_run_share_a_file_and_no_call_id(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path / "r", HEADER)
    channels = [recorder.channel(LoopbackChannel(Doubler(), PEER)) for _ in range(3)]

    def work(index: int) -> None:
        for _ in range(5):
            channels[index].call(step()).result(5)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    recorder.close()
    frames = list(open_recording(tmp_path / "r").frames())
    calls = {item.frame.call_id: item.connection for item in frames if item.is_sent}
    assert sorted(calls) == list(range(1, 16))
    replies = {item.frame.call_id: item.connection for item in frames if not item.is_sent}
    assert replies == calls


def test_a_recording_is_readable_by_its_owner_only(tmp_path: Path) -> None:
    recorded(tmp_path / "r")
    assert stat.S_IMODE((tmp_path / "r").stat().st_mode) == 0o600


def test_a_frame_that_cannot_be_recorded_is_not_sent(tmp_path: Path) -> None:
    service, recorder = Doubler(), Recorder(tmp_path / "r", HEADER)
    channel = recorder.channel(LoopbackChannel(service, PEER))
    recorder.close()
    with pytest.raises(StorageError, match="cannot record"):
        channel.call(step())
    assert service.seen == []


def test_a_full_disk_stops_the_run_and_leaves_whole_frames(tmp_path: Path) -> None:
    recorder, service = Recorder(tmp_path / "r", HEADER), Doubler()
    channel = recorder.channel(LoopbackChannel(service, PEER))
    channel.call(step()).result(0)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, ((tmp_path / "r").stat().st_size + 30, limits[1]))
    try:
        with pytest.raises(StorageError, match="cannot record"):
            channel.call(step())
        with pytest.raises(StorageError, match="it is closed"):
            channel.call(step())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    recorder.close()
    assert len(service.seen) == 1
    assert open_recording(tmp_path / "r", accepts_truncated=True).num_frames == 2


def test_a_recording_is_never_written_over(tmp_path: Path) -> None:
    before = recorded(tmp_path / "r")
    with pytest.raises(StorageError, match="it exists"):
        Recorder(tmp_path / "r", HEADER)
    assert len(list(open_recording(tmp_path / "r").frames())) == len(before)


def test_a_reply_after_the_end_reaches_its_caller_and_not_the_file(tmp_path: Path) -> None:
    recorded(tmp_path / "r")
    size = (tmp_path / "r").stat().st_size
    recorder = Recorder(tmp_path / "s", HEADER)
    recorder.close()
    recorder.close()
    assert open_recording(tmp_path / "s").num_frames == 0
    assert (tmp_path / "r").stat().st_size == size


@pytest.mark.parametrize("num_bytes", [1, 20, 47, 48, 49, 100, 10_000])
def test_a_killed_run_leaves_whole_frames_that_are_read_when_asked(
    tmp_path: Path, num_bytes: int
) -> None:
    path = tmp_path / "r"
    whole = recorded(path)
    data = path.read_bytes()
    start = len(prelude_of(HEADER))
    path.write_bytes(data[: max(start, len(data) - num_bytes)])
    with pytest.raises(StorageError, match=r"cut short: \d whole frames.*--truncated"):
        open_recording(path)
    recording = open_recording(path, accepts_truncated=True)
    assert not recording.is_whole
    left = list(recording.frames())
    assert len(left) == recording.num_frames
    pairs = zip(left, whole[: len(left)], strict=True)
    assert all(one.frame.header == other.frame.header for one, other in pairs)


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_one_changed_byte_is_always_noticed(tmp_path: Path, data: st.DataObject) -> None:
    path = tmp_path / "r"
    if not path.exists():
        recorded(path)
        (tmp_path / "good").write_bytes(path.read_bytes())
    content = bytearray((tmp_path / "good").read_bytes())
    place = data.draw(st.integers(0, len(content) - 1))
    content[place] ^= data.draw(st.integers(1, 255))
    path.write_bytes(content)
    with pytest.raises(StorageError):
        open_recording(path)
    with suppress(CutlayerError):
        list(open_recording(path, accepts_truncated=True).frames())


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(tail=st.binary(max_size=200))
def test_any_bytes_after_a_good_start_are_refused_or_cut_short(tmp_path: Path, tail: bytes) -> None:
    path = tmp_path / "r"
    path.write_bytes(prelude_of(HEADER) + tail)
    with pytest.raises(StorageError):
        open_recording(path)


def test_a_length_beyond_the_file_allocates_nothing(tmp_path: Path) -> None:
    path = tmp_path / "r"
    huge = ENTRY.pack(Direction.SENT, 0, 0, 1, 0, 1 << 60)
    path.write_bytes(prelude_of(HEADER) + huge + bytes(100))
    assert open_recording(path, accepts_truncated=True).num_frames == 0


def test_a_frame_beyond_the_limits_is_refused(tmp_path: Path) -> None:
    recorded(tmp_path / "r")
    recording = open_recording(tmp_path / "r", FrameLimits(max_frame_bytes=40))
    with pytest.raises(StorageError, match="larger than 40 bytes"):
        list(recording.frames())


def test_an_entry_that_is_no_frame_is_a_protocol_error(tmp_path: Path) -> None:
    path = tmp_path / "r"
    garbage = b"garbage" * 9
    entry = ENTRY.pack(Direction.SENT, 0, 0, 1, 0, len(garbage))
    path.write_bytes(prelude_of(HEADER) + entry + garbage)
    with pytest.raises(ProtocolError):
        list(open_recording(path, accepts_truncated=True).frames())


@pytest.mark.parametrize("content", [b"", b"CUTL", b"P" * 100, b"CUTL-REC\xff\xff" + bytes(90)])
def test_what_is_no_recording_is_named(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "letter.txt"
    path.write_bytes(content)
    with pytest.raises(StorageError, match=r"letter.txt"):
        open_recording(path, accepts_truncated=True)


@pytest.mark.parametrize("name", ["nowhere", "."])
def test_a_missing_recording_is_named(tmp_path: Path, name: str) -> None:
    with pytest.raises(StorageError, match="cannot read recording"):
        open_recording(tmp_path / name)


def test_every_kind_of_frame_can_be_recorded(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path / "r", HEADER)
    wanted = sample_frames()
    for message in wanted:
        recorder.write(Direction.SENT, 1, message)
    recorder.close()
    got = [item.frame for item in open_recording(tmp_path / "r").frames()]
    assert [frame.header for frame in got] == [frame.header for frame in wanted]
