"""The loopback channel, the recording channel, and errors as frames."""

import stat
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from wire_samples import sample_frames

from cutlayer.errors import (
    EXIT_CODES,
    CacheFull,
    CutlayerError,
    PermissionRefused,
    ProtocolError,
    StorageError,
    TransportError,
)
from cutlayer.wire import codec
from cutlayer.wire.channel import LoopbackChannel, Peer, error_of, failed_frame
from cutlayer.wire.frame import Frame, FrameLimits, frame_bytes
from cutlayer.wire.messages import Decode, Decoded, Failed, Kind
from cutlayer.wire.recording import RecordingChannel, read_recording

PEER = Peer(name="hospital", roles=frozenset({"train"}), serial=7, address="loopback")


@dataclass
class Doubler:
    """Answers with twice the tensor; "full", "bug" and "refuse" go wrong in their way."""

    peers: list[Peer] = field(default_factory=list)
    seen: list[Frame] = field(default_factory=list)
    num_closed: int = 0

    def connect(self, peer: Peer) -> "Doubler":
        self.peers.append(peer)
        return self

    def submit(self, frame: Frame) -> Future[Frame]:
        assert isinstance(frame.header, Decode)
        self.seen.append(frame)
        if frame.header.session_id == "refuse":
            raise PermissionRefused("generation needs the role generate")
        future: Future[Frame] = Future()
        if frame.header.session_id == "full":
            future.set_exception(CacheFull("no KV bytes left"))
        elif frame.header.session_id == "bug":
            future.set_exception(ZeroDivisionError("secret detail"))
        else:
            y = codec.decode(frame.tensors["h"]).mul_(2)
            future.set_result(Frame(Kind.DECODED, Decoded(), {"y": codec.encode(y, "bf16")}))
        return future

    def close(self) -> None:
        self.num_closed += 1


def step(command: str = "s", x: torch.Tensor | None = None) -> Frame:
    x = torch.ones(1, 4) if x is None else x
    header = Decode(session_id=command, rows=[0], lengths=[1], positions=[0])
    return Frame(Kind.DECODE, header, {"h": codec.encode(x)})


def test_loopback_answers_and_counts_the_bytes_of_frames() -> None:
    service = Doubler()
    channel = LoopbackChannel(service, PEER)
    call = step()
    reply = channel.call(call).result(0)
    assert codec.decode(reply.tensors["y"]).tolist() == [[2.0] * 4]
    assert service.peers == [PEER]
    assert (channel.bytes_sent, channel.bytes_received) == (frame_bytes(call), frame_bytes(reply))


def test_loopback_really_encodes_so_that_no_memory_is_shared() -> None:
    x = torch.ones(1, 4)
    LoopbackChannel(Doubler(), PEER).call(step(x=x)).result(0)
    assert x.tolist() == [[1.0] * 4], "the service doubled its own copy"


def test_loopback_has_the_limits_of_a_real_channel() -> None:
    channel = LoopbackChannel(Doubler(), PEER, FrameLimits(max_frame_bytes=128))
    with pytest.raises(ProtocolError, match="the limit is 128"):
        channel.call(step(x=torch.ones(1, 100))).result(0)


@pytest.mark.parametrize(
    ("command", "error", "text"),
    [
        ("full", CacheFull, "no KV bytes left"),
        ("refuse", PermissionRefused, "needs the role generate"),
        ("bug", CutlayerError, "its log says why"),
    ],
)
def test_errors_of_the_service_are_raised_by_the_call(
    command: str, error: type[CutlayerError], text: str
) -> None:
    with pytest.raises(error, match=text) as caught:
        LoopbackChannel(Doubler(), PEER).call(step(command)).result(0)
    assert type(caught.value) is error
    assert "secret" not in str(caught.value)


def test_a_closed_loopback_refuses_calls_and_tells_the_service_once() -> None:
    service = Doubler()
    channel = LoopbackChannel(service, PEER)
    channel.close()
    channel.close()
    assert service.num_closed == 1
    with pytest.raises(TransportError, match="closed"):
        channel.call(step()).result(0)


@pytest.mark.parametrize("error", sorted(EXIT_CODES, key=lambda error: error.__name__))
def test_every_error_survives_the_wire(error: type[CutlayerError]) -> None:
    failed = failed_frame(step(), error("what, where, what to do")).header
    assert isinstance(failed, Failed)
    back = error_of(failed)
    assert (type(back), str(back)) == (error, "what, where, what to do")


def test_an_error_text_cannot_steer_the_terminal_or_fill_it() -> None:
    failed = Failed(code="CacheFull", message="\x1b[2Jgone\r" + "x" * 10_000, retry_after_s=3.0)
    text = str(error_of(failed))
    assert "\x1b" not in text
    assert "\r" not in text
    assert len(text) <= 2000


def test_an_unknown_error_code_is_a_protocol_error() -> None:
    error = error_of(Failed(code="os.system", message="boo"))
    assert type(error) is ProtocolError
    assert "'os.system'" in str(error)


def test_a_recording_holds_each_frame_in_order(tmp_path: Path) -> None:
    channel = RecordingChannel(LoopbackChannel(Doubler(), PEER), tmp_path / "recording")
    replies = [channel.call(step(x=torch.full((1, 4), float(n)))).result(0) for n in range(3)]
    with pytest.raises(CacheFull):
        channel.call(step("full")).result(0)
    frames = list(read_recording(tmp_path / "recording"))
    assert [item.number for item in frames] == list(range(1, 9))
    assert [item.is_sent for item in frames] == [True, False] * 4
    assert [item.frame.call_id for item in frames] == [1, 1, 2, 2, 3, 3, 4, 4]
    assert codec.decode(frames[4].frame.tensors["h"]).tolist() == [[2.0] * 4]
    assert codec.decode(frames[5].frame.tensors["y"]).tolist() == [[4.0] * 4]
    assert frames[7].frame.kind is Kind.FAILED
    sizes = sum(frame_bytes(item.frame) for item in frames if item.is_sent)
    assert channel.bytes_sent == sizes
    assert channel.bytes_received > sum(frame_bytes(reply) for reply in replies)


def test_a_recording_is_readable_by_its_owner_only(tmp_path: Path) -> None:
    folder = tmp_path / "recording"
    RecordingChannel(LoopbackChannel(Doubler(), PEER), folder).call(step()).result(0)
    modes = {stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()}
    assert (stat.S_IMODE(folder.stat().st_mode), modes) == (0o700, {0o600})


def test_a_frame_that_cannot_be_recorded_is_not_sent(tmp_path: Path) -> None:
    service = Doubler()
    channel = RecordingChannel(LoopbackChannel(service, PEER), tmp_path / "recording")
    (tmp_path / "recording").rmdir()
    with pytest.raises(StorageError, match="cannot record"):
        channel.call(step())
    assert service.seen == []


def test_a_recording_is_never_mixed_with_another(tmp_path: Path) -> None:
    (tmp_path / "00000001-sent-hello.frame").touch()
    with pytest.raises(StorageError, match="not empty"):
        RecordingChannel(LoopbackChannel(Doubler(), PEER), tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "error"),
    [
        ("00000001-sent-decode.frame", b"garbage", ProtocolError),
        ("noise.frame", b"", StorageError),
    ],
)
def test_a_damaged_recording_is_an_error(
    tmp_path: Path, name: str, content: bytes, error: type[CutlayerError]
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(error):
        list(read_recording(tmp_path))


def test_a_missing_recording_is_named(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="nowhere"):
        list(read_recording(tmp_path / "nowhere"))


def test_every_kind_of_frame_can_be_recorded(tmp_path: Path) -> None:
    channel = RecordingChannel(LoopbackChannel(Doubler(), PEER), tmp_path / "r")
    for message in sample_frames():
        channel._write(message, "sent")
    kinds = [item.frame.kind for item in read_recording(tmp_path / "r")]
    assert kinds == [message.kind for message in sample_frames()]
