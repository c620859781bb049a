"""The loopback channel, and errors as frames."""

from concurrent.futures import Future
from dataclasses import dataclass, field

import pytest
import torch

from cutlayer.errors import (
    EXIT_CODES,
    CacheFull,
    CutlayerError,
    PermissionRefused,
    ProtocolError,
    TransportError,
)
from cutlayer.wire import codec
from cutlayer.wire.channel import LoopbackChannel, Peer, error_of, failed_frame
from cutlayer.wire.frame import Frame, FrameLimits, frame_bytes
from cutlayer.wire.messages import Decode, Decoded, Failed, Kind

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
