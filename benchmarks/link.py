"""An emulated link: a TCP proxy in its own process that delays, limits the rate and counts bytes.

It does not emulate loss, jitter, slow start or the round trip of a connection's set-up, and does
not look into the bytes. The process itself is `benchmarks.link_process`.
"""

import json
import subprocess
import sys
from dataclasses import asdict, dataclass
from types import TracebackType

__all__ = ["LINK_PROFILES", "Counters", "DelayingProxy", "LinkProfile"]


@dataclass(frozen=True, kw_only=True)
class LinkProfile:
    """What a link costs; the same in both directions."""

    rtt_ms: float
    """Round-trip time; half of it is added in each direction."""
    rate_mbit_per_s: float | None
    """10^6 bits per second in each direction; None is unlimited."""


LINK_PROFILES = {
    "loopback": LinkProfile(rtt_ms=0.0, rate_mbit_per_s=None),
    "lan": LinkProfile(rtt_ms=5.0, rate_mbit_per_s=1000.0),
    "wan": LinkProfile(rtt_ms=40.0, rate_mbit_per_s=100.0),
}
"""Links by name; `loopback` is a pure byte counter."""


@dataclass(frozen=True, kw_only=True)
class Counters:
    """Bytes of TCP payload that crossed since the last reset, TLS and framing included."""

    bytes_up: int
    """From the side that connected (the client) to the target (the server)."""
    bytes_down: int
    connections: int
    """Connections accepted."""

    def __sub__(self, earlier: "Counters") -> "Counters":
        return Counters(
            bytes_up=self.bytes_up - earlier.bytes_up,
            bytes_down=self.bytes_down - earlier.bytes_down,
            connections=self.connections - earlier.connections,
        )


class DelayingProxy:
    """A running proxy on 127.0.0.1; a context manager.

    Args:
        target_port: port on 127.0.0.1 to which every accepted connection is forwarded.
        profile: the link to emulate at first.
        port: port to listen on; 0 takes a free one.
    """

    def __init__(self, target_port: int, profile: LinkProfile, *, port: int = 0) -> None:
        command = [sys.executable, "-m", "benchmarks.link_process", str(port), str(target_port)]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.port = self._answer()["port"]
        self.set_link(profile)

    @property
    def address(self) -> str:
        """Where clients connect, host:port."""
        return f"127.0.0.1:{self.port}"

    def set_link(self, profile: LinkProfile) -> None:
        """Change the link, also under open connections; bytes on their way keep their delay."""
        self._ask({"do": "link", **asdict(profile)})

    def counters(self) -> Counters:
        """Bytes so far; whatever a peer has received is counted already."""
        return Counters(**self._ask({"do": "counters"}))

    def reset(self) -> None:
        """Set all counters to zero."""
        self._ask({"do": "reset"})

    def close(self) -> None:
        """Stop the process; open connections break."""
        if self._process.stdin is not None and not self._process.stdin.closed:
            self._process.stdin.close()
        self._process.wait(timeout=10)
        if self._process.stdout is not None:
            self._process.stdout.close()

    def __enter__(self) -> "DelayingProxy":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _ask(self, command: dict[str, str | float | None]) -> dict[str, int]:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(command) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, int]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"the proxy process ended with status {self._process.wait()}")
        answer: dict[str, int] = json.loads(line)
        return answer
