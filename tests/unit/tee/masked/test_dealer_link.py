"""The sealed link to a dealer: fresh keys each time, on both sides, and no words for a terminal."""

import os
import socket
import struct
import threading
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from cutlayer.errors import ConfigError, ProtocolError
from cutlayer.tee.masked.dealer_key import Asking, DealerKey
from cutlayer.tee.masked.framing import Frame, FrameKind, FrameSocket
from cutlayer.tee.masked.hook import mask_parts
from cutlayer.tee.masked.multiplier import Multiplier
from cutlayer.tee.masked.quantise import quantise_weight
from cutlayer.tee.masked.remote import RemoteDealing, WorkerLink
from cutlayer.tee.masked.settings import MaskedSettings
from cutlayer.tee.masked.worker import Worker
from cutlayer.tee.masked.worker_messages import Failed, told
from tests.masked_worlds import answering, running_workers

HEADER = struct.Struct("<4sBBHQIIQ")
TAG_BYTES = 16
PATIENCE_S = 60.0
"""The first test of a process also loads what torch loads late, on a machine that may be busy."""


class Recorder(socket.socket):
    """A connection that keeps what is sent on it."""

    sent = b""

    def sendall(self, data: bytes, flags: int = 0) -> None:  # type: ignore[override]
        self.sent += bytes(data)
        super().sendall(data, flags)


def _played(worker: Worker, data: bytes) -> list[FrameKind]:
    """What a worker answers to bytes that it gets as they are."""
    own, other = socket.socketpair()
    thread = threading.Thread(target=worker.serve, args=(other,), daemon=True)
    thread.start()
    answered = b""
    # It may hang up before it has read all; what it said until then is kept.
    with suppress(ConnectionResetError, BrokenPipeError):
        own.sendall(data)
        own.shutdown(socket.SHUT_WR)
        while piece := own.recv(1 << 16):
            answered += piece
    thread.join(PATIENCE_S)
    own.close()
    kinds = []
    while answered:
        _, kind, _, name_bytes, *_, body_bytes = HEADER.unpack(answered[: HEADER.size])
        kinds.append(FrameKind(kind))
        sealed_bytes = TAG_BYTES if len(kinds) > 1 else 0
        answered = answered[HEADER.size + name_bytes + body_bytes + sealed_bytes :]
    return kinds


def test_a_recorded_connection_is_not_answered_by_a_restarted_dealer(tmp_path: Path) -> None:
    """Under the old keys its refusals would open its old answers: same nonces, known words."""
    key = DealerKey.load(tmp_path / "key")
    weight = quantise_weight(torch.randn(64, 8), 16)
    recorded: list[Recorder] = []

    with answering(Worker("dealer", Multiplier(), key).serve) as open_:

        def record(address: str, timeout_s: float) -> socket.socket:
            recorded.append(Recorder(fileno=open_(address, timeout_s).detach()))
            return recorded[-1]

        for _ in range(2):
            link = WorkerLink("a:1", "dealer", PATIENCE_S, key.public_hex, open_=record)
            dealing = RemoteDealing(link)
            dealing.hold("layer", weight)
            dealing.answer(dealing.ask("layer", os.urandom(32), 5, False))
            link.close()
    answered = _played(Worker("dealer", Multiplier(), key), recorded[1].sent)
    # Its fresh key, its name under that; the rest of the record opens under neither.
    assert answered == [FrameKind.HELLO, FrameKind.HELLO]


def test_two_copies_of_a_machine_do_not_agree_on_one_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """OpenSSL's generator asks the system for nothing: both copies would draw what it has next."""
    key, fixed = DealerKey.load(tmp_path / "key"), X25519PrivateKey.generate()
    monkeypatch.setattr(X25519PrivateKey, "generate", lambda: fixed)
    sent: list[bytes] = []

    def listen(connection: socket.socket) -> None:
        sent.append(connection.recv(1 << 16))
        connection.close()

    with answering(listen) as open_:
        for _ in range(2):
            with pytest.raises(ProtocolError):
                WorkerLink("a:1", "dealer", PATIENCE_S, key.public_hex, open_=open_).hello()
    assert sent[0] != sent[1]


def test_both_sides_derive_the_same_keys_and_others_each_time(tmp_path: Path) -> None:
    key = DealerKey.load(tmp_path / "key")
    derived = set()
    for _ in range(2):
        asking = Asking(key.public_hex, bytes(31) + b"x")
        public, send_key, receive_key = key.accept(asking.public)
        assert asking.keys(public) == (receive_key, send_key)
        derived |= {send_key, receive_key}
    assert len(derived) == 4
    with pytest.raises(ProtocolError, match="no usable key"):
        asking.keys(bytes(32))
    with pytest.raises(ProtocolError, match="no usable key"):
        key.accept(bytes(32))


def test_workers_that_are_refused_are_left_alone(tmp_path: Path) -> None:
    with running_workers(tmp_path) as (accelerator, dealer, dealer_key):
        settings = MaskedSettings(accelerator=accelerator, dealer=dealer, dealer_key=dealer_key)
        before = _num_sockets()
        with pytest.raises(ConfigError, match="on one machine") as caught:
            mask_parts(settings)
        # The workers' ends close a little later; the error's frames keep what was not closed.
        deadline_s = time.monotonic() + 5
        while _num_sockets() > before and time.monotonic() < deadline_s:
            time.sleep(0.01)
        assert _num_sockets() == before
        assert caught.value.__traceback__ is not None


def _num_sockets() -> int:
    found = 0
    for name in os.listdir("/proc/self/fd"):
        with suppress(OSError):
            found += os.readlink(f"/proc/self/fd/{name}").startswith("socket:")
    return found


def test_a_refusal_in_place_of_a_hello_writes_no_lines_and_colours() -> None:
    def refuse(connection: socket.socket) -> None:
        wire = FrameSocket(connection, "part", PATIENCE_S)
        assert wire.receive() is not None
        message = told(Failed(message="no\n\x1b[31mFATAL " + 10_000 * "x"))
        wire.send(Frame(kind=FrameKind.FAILED, body=message))
        wire.close()

    with answering(refuse) as open_, pytest.raises(ProtocolError, match="refuses") as caught:
        WorkerLink("a:1", "accelerator", PATIENCE_S, open_=open_).hello()
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 1000
