"""Workers and the link to them: what is malformed, silent, hostile or somebody else is refused."""

import os
import socket
import struct
import threading
import time
import tracemalloc
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from cutlayer.errors import ConfigError, PeerMisbehaved, ProtocolError, TransportError
from cutlayer.tee.masked.address import check_address
from cutlayer.tee.masked.dealer_key import DealerKey
from cutlayer.tee.masked.framing import Frame, FrameKind, FrameSocket
from cutlayer.tee.masked.linear import MaskedPlace
from cutlayer.tee.masked.multiplier import Multiplier
from cutlayer.tee.masked.quantise import quantise_weight
from cutlayer.tee.masked.remote import RemoteAccelerator, RemoteDealing, WorkerLink, check_apart
from cutlayer.tee.masked.sources import Dealer, Pool, PoolLimits
from cutlayer.tee.masked.worker import Worker
from cutlayer.tee.masked.worker_messages import VERSION, Hello, Layout, told
from tests.masked_worlds import answering, masked

SILENCE_S = 0.3


def _pair(timeout_s: float = 5.0) -> tuple[FrameSocket, socket.socket]:
    own, other = socket.socketpair()
    return FrameSocket(own, "peer", timeout_s), other


def _place(link: WorkerLink) -> MaskedPlace:
    return MaskedPlace(RemoteAccelerator(link), Pool(PoolLimits(num_tokens=8, waits=True)))


def _hello(connection: socket.socket, role: str = "accelerator") -> FrameSocket:
    wire = FrameSocket(connection, "part", 5.0)
    assert wire.receive() is not None
    assert role in ("accelerator", "dealer")
    own = Hello(version=VERSION, role="dealer" if role == "dealer" else "accelerator")
    wire.send(Frame(kind=FrameKind.HELLO, body=told(own)))
    return wire


@pytest.mark.parametrize("is_sealed", [False, True])
@pytest.mark.parametrize("size", [0, 1, 100000, 5_000_001])
def test_a_frame_arrives_as_it_was_sent(is_sealed: bool, size: int) -> None:
    left, other = _pair()
    right = FrameSocket(other, "peer", 5.0)
    if is_sealed:
        left.seal(bytes(32), b"b" * 32)
        right.seal(b"b" * 32, bytes(32))
    body = os.urandom(size)
    frame = Frame(
        kind=FrameKind.DEAL, number=7, name="key", transpose=True, rows=3, columns=2, body=body
    )
    for _ in range(2):
        # A large one fits no buffer between the two.
        sending = threading.Thread(target=left.send, args=(frame,))
        sending.start()
        found = right.receive()
        sending.join()
        assert found is not None
        assert bytes(found.body) == body
        shown = (found.kind, found.number, found.name, found.transpose, found.rows, found.columns)
        assert shown == (FrameKind.DEAL, 7, "key", True, 3, 2)
    left.close()
    assert right.receive() is None
    right.close()


@given(st.binary(min_size=1, max_size=200))
@settings(max_examples=150, deadline=None)
def test_any_bytes_are_a_named_error(data: bytes) -> None:
    wire, other = _pair()
    header = struct.pack("<4sBBHQIIQ", b"CLM1", 3, 0, 4, 1, 1, 1, 60)
    for start in (b"", header[: len(data) % 33]):
        other.sendall(start + data)
    other.close()
    with pytest.raises((ProtocolError, TransportError)):
        list(iter(wire.receive, None))
    wire.close()


def test_a_huge_frame_is_refused_before_memory_is_taken() -> None:
    wire, other = _pair()
    other.sendall(struct.pack("<4sBBHQIIQ", b"CLM1", 3, 0, 4, 1, 1, 1, 1 << 60))
    with pytest.raises(ProtocolError, match="announced"):
        wire.receive()
    other.close()
    wire.close()


def test_an_announced_body_takes_no_memory_before_it_comes() -> None:
    wire, other = _pair()
    other.sendall(struct.pack("<4sBBHQIIQ", b"CLM1", 3, 0, 4, 1, 1, 1, 1 << 28) + bytes(1000))
    other.shutdown(socket.SHUT_WR)
    tracemalloc.start()
    before_bytes, _ = tracemalloc.get_traced_memory()
    with pytest.raises(TransportError, match="within a frame"):
        wire.receive()
    peak_bytes = tracemalloc.get_traced_memory()[1] - before_bytes
    tracemalloc.stop()
    assert peak_bytes < 1 << 23
    other.close()
    wire.close()


def test_a_changed_sealed_frame_is_refused() -> None:
    left, other = _pair()
    right = FrameSocket(other, "peer", 5.0)
    left.seal(bytes(32), bytes(32))
    right.seal(bytes(32), b"x" * 32)
    left.send(Frame(kind=FrameKind.DEAL, body=b"seed"))
    with pytest.raises(ProtocolError, match="does not hold the key"):
        right.receive()
    left.close()
    right.close()


@pytest.mark.parametrize("role", ["accelerator", "dealer"])
def test_a_worker_survives_any_frame(role: str, tmp_path: Path) -> None:
    key = DealerKey.load(tmp_path / "key") if role == "dealer" else None
    worker = Worker("dealer" if role == "dealer" else "accelerator", Multiplier(), key)
    with answering(worker.serve) as open_:
        link = WorkerLink(
            "a:1", worker.role, 5.0, None if key is None else key.public_hex, open_=open_
        )
        for kind in (FrameKind.MULTIPLY, FrameKind.DEAL, FrameKind.HOLD, FrameKind.ROWS):
            for body in (b"", b"{}", b"\0" * 32, os.urandom(40)):
                with pytest.raises(ProtocolError, match="refuses"):
                    link.call(Frame(kind=kind, name="none", rows=1, columns=8, body=body))
        weight = quantise_weight(torch.randn(3, 4), 16)
        link.hold("layer", weight)
        link.close()


def test_a_worker_refuses_the_other_role_s_work(tmp_path: Path) -> None:
    """One that multiplied masked numbers and pads would know both."""
    worker = Worker("accelerator", Multiplier())
    with answering(worker.serve) as open_:
        link = WorkerLink("a:1", "accelerator", 5.0, open_=open_)
        link.hold("layer", quantise_weight(torch.randn(3, 4), 16))
        with pytest.raises(ProtocolError, match="does not answer DEAL"):
            link.call(Frame(kind=FrameKind.DEAL, name=link.key("layer"), rows=1, body=bytes(32)))
        with pytest.raises(ConfigError, match="role accelerator"):
            WorkerLink("a:1", "dealer", 5.0, open_=open_).hello()
        link.close()
    with pytest.raises(ConfigError, match="makes no sense"):
        Worker("dealer", Multiplier())
    with pytest.raises(ConfigError, match="makes no sense"):
        Worker("accelerator", Multiplier(), DealerKey.load(tmp_path / "key"))


def test_layers_too_large_for_a_worker_are_refused() -> None:
    worker = Worker("accelerator", Multiplier(), max_weight_bytes=100)
    with answering(worker.serve) as open_:
        link = WorkerLink("a:1", "accelerator", 5.0, open_=open_)
        with pytest.raises(ProtocolError, match="max_weight_bytes is 100"):
            link.hold("layer", quantise_weight(torch.randn(30, 40), 16))
        link.close()
    with pytest.raises(ConfigError, match="limit 100"):
        Multiplier(max_bytes=100).hold("layer", quantise_weight(torch.randn(30, 40), 16))


def test_an_announced_layer_takes_no_memory_before_its_bytes_come() -> None:
    worker = Worker("accelerator", Multiplier())
    layout = Layout(
        dtype="int8", limbs=1, outputs=1 << 14, inputs=1 << 14, forward_block=1, backward_block=1
    )
    with answering(worker.serve) as open_:
        link = WorkerLink("a:1", "accelerator", 30.0, open_=open_)
        link.hello()
        tracemalloc.start()
        before_bytes, _ = tracemalloc.get_traced_memory()
        link.call(Frame(kind=FrameKind.HOLD, name="0" * 64, body=told(layout)))
        peak_bytes = tracemalloc.get_traced_memory()[1] - before_bytes
        tracemalloc.stop()
        link.close()
    assert peak_bytes < layout.num_bytes / 100


@pytest.mark.parametrize("role", ["accelerator", "dealer"])
def test_an_answer_that_no_frame_can_hold_is_not_computed(role: str, tmp_path: Path) -> None:
    key = DealerKey.load(tmp_path / "key") if role == "dealer" else None
    multiplier = Multiplier()
    worker = Worker("dealer" if role == "dealer" else "accelerator", multiplier, key)
    computed: list[int] = []
    multiplier.multiply = lambda *_: computed.append(1)  # type: ignore[assignment, method-assign]
    with answering(worker.serve) as open_:
        public = None if key is None else key.public_hex
        link = WorkerLink("a:1", worker.role, 5.0, public, open_=open_)
        link.hold("wide", quantise_weight(torch.randn(1 << 16, 1), 16))
        kind, body = (FrameKind.MULTIPLY, bytes(4 * 513)) if key is None else (FrameKind.DEAL, b"")
        frame = Frame(kind=kind, name=link.key("wide"), rows=513, columns=1, body=body or bytes(32))
        with pytest.raises(ProtocolError, match="ask for fewer"):
            link.call(frame)
        link.close()
    assert not computed


def test_a_layer_that_a_worker_holds_is_not_sent_again() -> None:
    sent: list[FrameKind] = []

    class Noting(WorkerLink):
        def send(self, frame: Frame) -> int:
            sent.append(frame.kind)
            return super().send(frame)

    worker = Worker("accelerator", Multiplier())
    weight = quantise_weight(torch.randn(30, 40), 16)
    with answering(worker.serve) as open_:
        for name in ("one", "two"):
            link = Noting("a:1", "accelerator", 5.0, open_=open_)
            link.hold(name, weight)
            link.close()
    assert sent == [FrameKind.HOLD, FrameKind.ROWS, FrameKind.HOLD]


def test_a_restarted_worker_is_a_named_error() -> None:
    with answering(Worker("accelerator", Multiplier()).serve) as first:
        link = WorkerLink("a:1", "accelerator", 5.0, open_=first)
        other = masked(nn.Linear(4, 3), _place(link))
        other(torch.randn(2, 4))
        link.close()
    with answering(Worker("accelerator", Multiplier()).serve) as second:
        link._open = second
        with pytest.raises(TransportError, match="was restarted"):
            other(torch.randn(2, 4))
        link.close()


def test_a_broken_connection_is_made_again() -> None:
    with answering(Worker("accelerator", Multiplier()).serve) as open_:
        link = WorkerLink("a:1", "accelerator", 5.0, open_=open_)
        other = masked(nn.Linear(4, 3), _place(link))
        other(torch.randn(2, 4))
        assert link._wire is not None
        link._wire.close()
        with pytest.raises(TransportError):
            other(torch.randn(2, 4))
        other(torch.randn(2, 4))
        link.close()


def test_a_silent_worker_is_a_named_error() -> None:
    def stay_silent(connection: socket.socket) -> None:
        _hello(connection)
        time.sleep(2 * SILENCE_S)

    with answering(stay_silent) as open_:
        link = WorkerLink("a:1", "accelerator", SILENCE_S, open_=open_)
        began_s = time.monotonic()
        with pytest.raises(TransportError, match="is silent"):
            link.hold("layer", quantise_weight(torch.randn(3, 4), 16))
        assert time.monotonic() - began_s < 10 * SILENCE_S


def test_a_worker_that_repeats_an_old_answer_is_a_named_error() -> None:
    repeated = Frame(kind=FrameKind.DONE, number=1)

    def repeat(connection: socket.socket) -> None:
        wire = _hello(connection)
        with suppress(TransportError):
            while True:
                wire.send(repeated)
                time.sleep(SILENCE_S / 10)

    with answering(repeat) as open_:
        link = WorkerLink("a:1", "accelerator", SILENCE_S, open_=open_)
        link.hello()
        link.call(Frame(kind=FrameKind.HOLD))
        caught: list[Exception] = []

        def ask() -> None:
            try:
                link.call(Frame(kind=FrameKind.HOLD))
            except ProtocolError as error:
                caught.append(error)

        thread = threading.Thread(target=ask, daemon=True)
        thread.start()
        thread.join(timeout=5)
        link.close()
    assert "answered question 1, not 2" in str(caught[0])


def test_no_worker_at_all_is_a_named_error(tmp_path: Path) -> None:
    for address in ("127.0.0.1:1", f"unix:{tmp_path / 'none'}"):
        with pytest.raises(TransportError, match="no worker answers"):
            WorkerLink(address, "accelerator", 1.0).hello()


@pytest.mark.parametrize(
    ("rows", "columns", "body"),
    [(2, 6, bytes(48)), (2, 5, bytes(40)), (3, 6, bytes(72)), (2, 6, bytes(44)), (0, 0, b"")],
    ids=["zeros", "narrow", "long", "short", "none"],
)
def test_an_answer_of_another_form_is_refused(rows: int, columns: int, body: bytes) -> None:
    def answer(connection: socket.socket) -> None:
        wire = _hello(connection)
        while (frame := wire.receive()) is not None:
            reply = Frame(kind=FrameKind.DONE, number=frame.number, rows=1)
            if frame.kind is FrameKind.MULTIPLY:
                reply = Frame(
                    kind=FrameKind.PRODUCT,
                    number=frame.number,
                    rows=rows,
                    columns=columns,
                    body=body,
                )
            wire.send(reply)

    with answering(answer) as open_:
        link = WorkerLink("a:1", "accelerator", 5.0, open_=open_)
        other = masked(nn.Linear(4, 3), _place(link))
        with pytest.raises((PeerMisbehaved, ProtocolError)):
            other(torch.randn(2, 4))
        link.close()


def test_a_dealer_without_the_key_of_the_settings_is_refused(tmp_path: Path) -> None:
    keys = [DealerKey.load(tmp_path / name) for name in ("own", "other")]
    assert oct((tmp_path / "own").stat().st_mode & 0o777) == "0o600"
    assert DealerKey.load(tmp_path / "own").public_hex == keys[0].public_hex
    with answering(Worker("dealer", Multiplier(), keys[0]).serve) as open_:
        with pytest.raises(ProtocolError, match="does not hold the key"):
            WorkerLink("a:1", "dealer", 5.0, keys[1].public_hex, open_=open_).hello()
        with pytest.raises(ProtocolError, match="sealed link"):
            WorkerLink("a:1", "dealer", 5.0, open_=open_).hello()
        with pytest.raises(ConfigError, match="no X25519 key"):
            WorkerLink("a:1", "dealer", 5.0, "abc", open_=open_).hello()
    (tmp_path / "own").write_bytes(b"short")
    with pytest.raises(ConfigError, match="no dealer key"):
        DealerKey.load(tmp_path / "own")


def test_the_dealer_s_link_shows_neither_seeds_nor_answers(tmp_path: Path) -> None:
    key = DealerKey.load(tmp_path / "key")
    seen: list[bytes] = []
    own, other = socket.socketpair()
    near, far = socket.socketpair()

    def forward(source: socket.socket, target: socket.socket) -> None:
        while data := source.recv(1 << 16):
            seen.append(data)
            target.sendall(data)
        target.shutdown(socket.SHUT_WR)

    worker = Worker("dealer", Multiplier(), key)
    threads = [
        threading.Thread(target=forward, args=ends, daemon=True)
        for ends in ((other, near), (near, other))
    ]
    threads.append(threading.Thread(target=worker.serve, args=(far,), daemon=True))
    for thread in threads:
        thread.start()
    link = WorkerLink("a:1", "dealer", 5.0, key.public_hex, open_=lambda *_: own)
    dealing = RemoteDealing(link)
    weight = quantise_weight(torch.randn(3, 40), 16)
    dealing.hold("layer", weight)
    seed = os.urandom(32)
    unmask = dealing.answer(dealing.ask("layer", seed, 5, False))
    link.close()
    for thread in threads:
        thread.join(timeout=5)
    told_all = b"".join(seen)
    assert seed not in told_all
    assert unmask.numpy().tobytes()[:16] not in told_all
    for end in (other, near):
        end.close()


def test_an_answer_that_nobody_waited_for_is_skipped(tmp_path: Path) -> None:
    key = DealerKey.load(tmp_path / "key")
    with answering(Worker("dealer", Multiplier(), key).serve) as open_:
        dealer = Dealer(
            RemoteDealing(WorkerLink("a:1", "dealer", 5.0, key.public_hex, open_=open_))
        )
        place = MaskedPlace(Multiplier(), dealer)
        layer = nn.Linear(4, 3)
        other = masked(layer, place)
        dealer.take("layer", 2, False)
        x = torch.randn(2, 4)
        assert torch.allclose(other(x), layer(x), atol=1e-3)
        place.close()


def test_a_forked_child_does_not_speak_on_its_parent_s_connection() -> None:
    with answering(Worker("accelerator", Multiplier()).serve) as open_:
        link = WorkerLink("a:1", "accelerator", 5.0, open_=open_)
        link.hello()
        child = os.fork()
        if child == 0:
            os._exit(int(link._wire is not None))
        _, status = os.waitpid(child, 0)
        assert status == 0
        link.hold("layer", quantise_weight(torch.randn(3, 4), 16))
        link.close()


def test_dealer_and_accelerator_must_be_two() -> None:
    one = Hello(version=VERSION, role="accelerator", instance="a", machine="m")
    with pytest.raises(ConfigError, match="one process"):
        check_apart(one, Hello(version=VERSION, role="dealer", instance="a", machine="n"), True)
    same = Hello(version=VERSION, role="dealer", instance="b", machine="m")
    with pytest.raises(ConfigError, match="one machine"):
        check_apart(one, same, False)
    check_apart(one, same, True)
    check_apart(one, Hello(version=VERSION, role="dealer", instance="b", machine="n"), False)


@pytest.mark.parametrize("address", ["", "host", "host:x", "host:99999", "unix:", "host:"])
def test_an_address_is_checked(address: str) -> None:
    with pytest.raises(ValueError, match="write unix:PATH or HOST:PORT"):
        check_address(address)


def test_a_unix_socket_is_its_owner_s_alone_and_taken_once(tmp_path: Path) -> None:
    path = tmp_path / "w.sock"
    worker = Worker("accelerator", Multiplier())
    worker.start(f"unix:{path}")
    assert oct(path.stat().st_mode & 0o777) == "0o600"
    link = WorkerLink(f"unix:{path}", "accelerator", 5.0)
    assert link.hello().instance == worker.instance
    link.close()
    with pytest.raises(ConfigError, match="in use"):
        Worker("accelerator", Multiplier()).start(f"unix:{path}")
    worker.stop()
    # What it left behind is no hindrance.
    again = Worker("accelerator", Multiplier())
    again.start(f"unix:{path}")
    again.stop()
