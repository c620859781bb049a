"""The trunk server of the soak run, which also says what memory it holds.

As a module it reads a `ServeRequest`, says where it listens, and then answers each line of stdin
with its `ServerMemory`. It does not judge.
"""

import sys

import msgspec

from benchmarks.isolate import answer, read_request
from benchmarks.serving_world import parse_metrics
from benchmarks.soak_memory import settled_bytes
from benchmarks.split import ServeRequest, server_settings
from cutlayer import TrunkServer

__all__ = ["ServerMemory", "ServerPort"]


class ServerPort(msgspec.Struct, frozen=True, kw_only=True):
    """Where clients connect."""

    port: int


class ServerMemory(msgspec.Struct, frozen=True, kw_only=True):
    """What the server holds now."""

    resident_bytes: int
    num_sessions: int
    num_evictions: int
    """Rows whose cache was dropped for others, since the start."""


def _memory(server: TrunkServer) -> ServerMemory:
    metrics = parse_metrics(server.metrics().decode())
    return ServerMemory(
        resident_bytes=settled_bytes(),
        num_sessions=int(metrics["cutlayer_sessions"]),
        num_evictions=int(metrics["cutlayer_evicted_rows"]),
    )


def main() -> None:
    """Serve until stdin is closed."""
    server = TrunkServer(server_settings(read_request(ServeRequest)))
    server.start()
    answer(ServerPort(port=server.port))
    for _ in iter(sys.stdin.readline, ""):
        answer(_memory(server))
    server.stop(grace_s=0)


if __name__ == "__main__":
    main()
