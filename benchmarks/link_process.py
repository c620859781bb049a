"""The proxy process behind `benchmarks.link`: threads that read, wait until a byte is due, write.

Run as `python -m benchmarks.link_process PORT TARGET_PORT`; commands are JSON lines on stdin, one
answer line each on stdout; it ends when stdin closes. It imports nothing heavy and keeps no bytes
longer than the link does.

Threads and not asyncio: an epoll timeout is a whole number of milliseconds, a sleep is exact to
about 0.1 ms, and at a round trip of 5 ms that difference would be a fifth of the measurement.
"""

import contextlib
import json
import queue
import socket
import sys
import threading
import time
from dataclasses import dataclass, field

__all__ = ["Lane", "main"]

_MAX_BACKLOG_S = 0.05
"""How far the reader may run ahead of the link; beyond it the sender feels back-pressure."""
_MAX_QUEUED_CHUNKS = 1024
_MAX_CHUNK_BYTES = 65536
_MIN_CHUNK_BYTES = 4096


@dataclass
class Lane:
    """One direction of the link, shared by all connections: its clock and its counter."""

    delay_s: float = 0.0
    bytes_per_s: float | None = None
    num_bytes: int = 0
    free_at_s: float = 0.0
    """When the link has put its last accepted byte on the wire."""
    lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def is_transparent(self) -> bool:
        """Neither delay nor rate: bytes may be passed on at once."""
        return self.delay_s == 0.0 and self.bytes_per_s is None

    @property
    def chunk_bytes(self) -> int:
        """Read size: about a millisecond of the link, as a chunk arrives as one."""
        if self.bytes_per_s is None:
            return _MAX_CHUNK_BYTES
        return int(min(max(self.bytes_per_s * 1e-3, _MIN_CHUNK_BYTES), _MAX_CHUNK_BYTES))

    def accept(self, num_bytes: int, now_s: float) -> float:
        """Count a chunk and say when its last byte has arrived at the other end."""
        with self.lock:
            self.num_bytes += num_bytes
            begin_s = max(now_s, self.free_at_s)
            wire_s = num_bytes / self.bytes_per_s if self.bytes_per_s else 0.0
            self.free_at_s = begin_s + wire_s
            return self.free_at_s + self.delay_s

    def backlog_s(self, now_s: float) -> float:
        """How long the wire is still busy with what it accepted."""
        return max(0.0, self.free_at_s - now_s)


class _Pipe:
    """One direction of one connection: a reader thread, and a writer thread that waits."""

    def __init__(self, source: socket.socket, sink: socket.socket, lane: Lane) -> None:
        self._source, self._sink, self._lane = source, sink, lane
        self._queue: queue.Queue[tuple[float, bytes]] = queue.Queue(_MAX_QUEUED_CHUNKS)
        self._is_broken = False
        self.threads = [
            threading.Thread(target=self._read, daemon=True),
            threading.Thread(target=self._write, daemon=True),
        ]

    def _read(self) -> None:
        chunk = b"-"
        while chunk and not self._is_broken:
            try:
                chunk = self._source.recv(self._lane.chunk_bytes)
            except OSError:
                chunk = b""
            self._pass_on(chunk)

    def _pass_on(self, chunk: bytes) -> None:
        due_s = self._lane.accept(len(chunk), time.monotonic())
        if chunk and self._lane.is_transparent and self._queue.unfinished_tasks == 0:
            self._send(chunk)
            return
        self._queue.put((due_s, chunk))
        ahead_s = self._lane.backlog_s(time.monotonic()) - _MAX_BACKLOG_S
        if ahead_s > 0:
            time.sleep(ahead_s)

    def _write(self) -> None:
        chunk = b"-"
        while chunk:
            due_s, chunk = self._queue.get()
            while (wait_s := due_s - time.monotonic()) > 0:
                time.sleep(wait_s)
            self._send(chunk)
            self._queue.task_done()

    def _send(self, chunk: bytes) -> None:
        """Write a chunk; an empty one is the end of the stream. A dead sink stops the source."""
        if self._is_broken:
            return
        try:
            if chunk:
                self._sink.sendall(chunk)
            else:
                self._sink.shutdown(socket.SHUT_WR)
        except OSError:
            self._is_broken = True
            _shut(self._source)


class _Proxy:
    """Accepts connections and joins each with one to the target."""

    def __init__(self, port: int, target_port: int) -> None:
        self._target_port = target_port
        self._listener = socket.create_server(("127.0.0.1", port))
        self.port = int(self._listener.getsockname()[1])
        self.up, self.down = Lane(), Lane()
        self.connections = 0

    def serve(self) -> None:
        """Accept for ever."""
        while True:
            near, _ = self._listener.accept()
            self.connections += 1
            threading.Thread(target=self._join, args=(near,), daemon=True).start()

    def _join(self, near: socket.socket) -> None:
        try:
            far = socket.create_connection(("127.0.0.1", self._target_port), timeout=10)
        except OSError:
            near.close()
            return
        with near, far:
            far.settimeout(None)
            for end in (near, far):
                end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            threads = _Pipe(near, far, self.up).threads + _Pipe(far, near, self.down).threads
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()

    def answer(self, command: dict[str, str | float | None]) -> dict[str, int]:
        """Carry out one command line."""
        if command["do"] == "link":
            self._set_link(command["rtt_ms"], command["rate_mbit_per_s"])
        elif command["do"] == "reset":
            self.up.num_bytes = self.down.num_bytes = self.connections = 0
        return {
            "bytes_up": self.up.num_bytes,
            "bytes_down": self.down.num_bytes,
            "connections": self.connections,
        }

    def _set_link(self, rtt_ms: str | float | None, rate_mbit: str | float | None) -> None:
        for lane in (self.up, self.down):
            lane.delay_s = float(rtt_ms or 0.0) / 2e3
            lane.bytes_per_s = float(rate_mbit) * 1e6 / 8 if rate_mbit else None


def _shut(end: socket.socket) -> None:
    with contextlib.suppress(OSError):
        end.shutdown(socket.SHUT_RDWR)


def main(arguments: list[str]) -> None:
    """Serve until stdin closes.

    Args:
        arguments: port to listen on (0 is any) and port to forward to.
    """
    proxy = _Proxy(int(arguments[0]), int(arguments[1]))
    threading.Thread(target=proxy.serve, daemon=True).start()
    print(json.dumps({"port": proxy.port}), flush=True)
    for line in sys.stdin:
        print(json.dumps(proxy.answer(json.loads(line))), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
