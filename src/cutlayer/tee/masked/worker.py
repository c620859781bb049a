"""A worker: multiplies for masked parts, as their accelerator or as their dealer, never as both.

It decides nothing and keeps no pads. It computes for whoever reaches it: what it is sent as an
accelerator tells nothing, and what it answers is checked by whoever asked.
"""

import hashlib
import os
import secrets
import socket
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from cutlayer.errors import ConfigError, CutlayerError, ProtocolError, TransportError
from cutlayer.tee.masked.address import listen
from cutlayer.tee.masked.dealer_key import DealerKey
from cutlayer.tee.masked.field import check_range, words
from cutlayer.tee.masked.framing import MAX_BODY_BYTES, Frame, FrameKind, FrameSocket
from cutlayer.tee.masked.multiplier import Multiplier
from cutlayer.tee.masked.pads import SEED_BYTES
from cutlayer.tee.masked.worker_messages import (
    VERSION,
    Failed,
    Hello,
    Layout,
    Role,
    from_hex,
    layer_key,
    read,
    tensor_bytes,
    tensor_of,
    told,
)

__all__ = ["Worker"]

_MAX_WORDS = MAX_BODY_BYTES // 4
_JOIN_S = 10.0


@dataclass
class _Upload:
    layout: Layout
    raw: bytearray = field(default_factory=bytearray, repr=False)
    """What has come: an announcement alone takes no memory."""


class Worker:
    """Answers any number of connections, one thread each."""

    def __init__(
        self,
        role: Role,
        multiplier: Multiplier,
        key: DealerKey | None = None,
        max_weight_bytes: int = 1 << 34,
        idle_s: float | None = None,
    ) -> None:
        """
        Args:
            role: accelerator or dealer.
            multiplier: holds the layers.
            key: of a dealer; an accelerator has none.
            max_weight_bytes: of one layer that arrives.
            idle_s: a connection that is silent for so long is closed; None never.

        Raises:
            ConfigError: a dealer without a key.
        """
        if (role == "dealer") != (key is not None):
            raise ConfigError(f"a worker with role {role} and key={key is not None} makes no sense")
        self.role: Role = role
        self.instance = secrets.token_hex(16)
        self._multiplier = multiplier
        self._key = key
        self._max_weight_bytes = max_weight_bytes
        self._idle_s = idle_s
        self._held: set[str] = set()
        self._lock = threading.Lock()
        self._listener: socket.socket | None = None
        self._open: set[FrameSocket] = set()
        self._threads: list[threading.Thread] = []

    def start(self, address: str) -> str:
        """Listen in a thread; the address with the port that was taken.

        Raises:
            ConfigError: the address cannot be used.
        """
        self._listener, taken = listen(address)
        self._start(self._accept, self._listener)
        return taken

    def stop(self) -> None:
        """Stop listening and close all connections."""
        if self._listener is not None:
            # Another thread waits in accept: closing alone does not wake it.
            self._listener.shutdown(socket.SHUT_RDWR)
            self._listener.close()
        for wire in list(self._open):
            wire.close()
        for thread in list(self._threads):
            thread.join(timeout=_JOIN_S)

    def serve(self, connection: socket.socket) -> None:
        """Answer one connection until it ends."""
        try:
            wire = FrameSocket(connection, "a masked part", self._idle_s)
        except OSError:
            connection.close()  # Gone before it was answered.
            return
        self._open.add(wire)
        try:
            if self._greet(wire):
                self._answer_all(wire)
        except (ProtocolError, TransportError):
            pass  # Whoever broke the format or the line learns it from the closed connection.
        finally:
            self._open.discard(wire)
            wire.close()

    def _start(self, work: Callable[[socket.socket], None], end: socket.socket) -> None:
        self._threads = [thread for thread in self._threads if thread.is_alive()]
        self._threads.append(threading.Thread(target=work, args=(end,), daemon=True))
        self._threads[-1].start()

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            self._start(self.serve, connection)

    def _greet(self, wire: FrameSocket) -> bool:
        frame = wire.receive()
        if frame is None or frame.kind is not FrameKind.HELLO:
            return False
        hello = read(frame, Hello, "a masked part")
        if hello.version != VERSION:
            self._fail(wire, frame, f"version {hello.version} is wanted, this worker has {VERSION}")
            return False
        if self._key is not None and hello.ephemeral:
            told_key, send_key, receive_key = self._key.accept(from_hex(hello.ephemeral))
            plain = Hello(version=VERSION, role=self.role, ephemeral=told_key.hex())
            wire.send(Frame(kind=FrameKind.HELLO, number=frame.number, body=told(plain)))
            wire.seal(send_key, receive_key)
        elif self._key is not None:
            self._fail(wire, frame, "a dealer is asked over a sealed link; this is a dealer")
            return False
        own = Hello(version=VERSION, role=self.role, instance=self.instance, machine=_machine())
        wire.send(Frame(kind=FrameKind.HELLO, number=frame.number, body=told(own)))
        return True

    def _answer_all(self, wire: FrameSocket) -> None:
        uploads: dict[str, _Upload] = {}
        while (frame := wire.receive()) is not None:
            try:
                answer = self._answer(frame, uploads)
            except CutlayerError as error:
                self._fail(wire, frame, str(error))
            except RuntimeError as error:
                # Out of memory on the device, perhaps: the next call may be smaller.
                self._fail(wire, frame, str(error).splitlines()[0])
            else:
                wire.send(answer)

    def _fail(self, wire: FrameSocket, frame: Frame, message: str) -> None:
        body = told(Failed(message=message[:500]))
        wire.send(Frame(kind=FrameKind.FAILED, number=frame.number, body=body))

    def _answer(self, frame: Frame, uploads: dict[str, _Upload]) -> Frame:
        if frame.kind is FrameKind.HOLD:
            return self._hold(frame, uploads)
        if frame.kind is FrameKind.ROWS:
            return self._take_rows(frame, uploads)
        if frame.kind is FrameKind.MULTIPLY and self.role == "accelerator":
            return self._multiply(frame)
        if frame.kind is FrameKind.DEAL and self.role == "dealer":
            return self._deal(frame)
        # Both in one place would be no mask at all.
        raise ProtocolError(f"a worker with role {self.role} does not answer {frame.kind.name}")

    def _hold(self, frame: Frame, uploads: dict[str, _Upload]) -> Frame:
        layout = read(frame, Layout, "a masked part")
        layout.check()
        if frame.name not in self._held:
            if layout.num_bytes > self._max_weight_bytes:
                raise ConfigError(
                    f"a layer of {layout.num_bytes} bytes; the worker's max_weight_bytes is "
                    f"{self._max_weight_bytes}"
                )
            uploads.clear()
            uploads[frame.name] = _Upload(layout)
        return Frame(kind=FrameKind.DONE, number=frame.number, rows=int(frame.name in self._held))

    def _take_rows(self, frame: Frame, uploads: dict[str, _Upload]) -> Frame:
        upload = uploads.get(frame.name)
        if upload is None or len(upload.raw) + len(frame.body) > upload.layout.num_bytes:
            raise ProtocolError("bytes of a layer that was not announced, or more than it has")
        upload.raw += frame.body
        if len(upload.raw) == upload.layout.num_bytes:
            del uploads[frame.name]
            if layer_key(upload.layout, upload.raw) != frame.name:
                raise ProtocolError("the bytes of a layer are not those of its key")
            with self._lock:
                self._multiplier.hold(frame.name, upload.layout.weight(upload.raw))
                self._held.add(frame.name)
        return Frame(kind=FrameKind.DONE, number=frame.number)

    def _multiply(self, frame: Frame) -> Frame:
        masked_NK = tensor_of(frame, "a masked part")
        check_range(words(masked_NK), sender="a masked part")
        self._check_room(frame)
        products_NM = self._multiplier.multiply(frame.name, masked_NK, frame.transpose)
        return _matrix(FrameKind.PRODUCT, frame, products_NM)

    def _deal(self, frame: Frame) -> Frame:
        if len(frame.body) != SEED_BYTES or not frame.rows:
            raise ProtocolError(f"no pad has a seed of {len(frame.body)} bytes and {frame.rows}")
        self._check_room(frame)
        unmask_NM = self._multiplier.unmask_NM(
            frame.name, bytes(frame.body), frame.rows, frame.transpose
        )
        return _matrix(FrameKind.DEALT, frame, unmask_NM)

    def _check_room(self, frame: Frame) -> None:
        """Refuse what cannot be answered before it is computed: a few words ask for gigabytes."""
        name, way = frame.name, frame.transpose
        most = max(self._multiplier.width(name, way), self._multiplier.num_products(name, way))
        if frame.rows * most > _MAX_WORDS:
            raise ProtocolError(
                f"{frame.rows} tokens of {most} numbers exceed a frame of {MAX_BODY_BYTES} bytes; "
                "ask for fewer at once"
            )


def _matrix(kind: FrameKind, asked: Frame, values_NM: Tensor) -> Frame:
    """The answer to a frame that asked for numbers."""
    return Frame(
        kind=kind,
        number=asked.number,
        rows=values_NM.shape[0],
        columns=values_NM.shape[1],
        body=tensor_bytes(values_NM),
    )


def _machine() -> str:
    """The same for all processes of one running kernel."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_bytes()
    except OSError:
        boot = os.uname().nodename.encode()
    return hashlib.sha256(b"cutlayer masked worker" + boot).hexdigest()[:32]
