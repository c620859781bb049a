"""One replica: an ordinary trunk server that also takes its front's orders.

It does not know the other replicas, nor who started it. Run as a program it is a process of
`launchers.LocalProcesses`: its plan comes as one line of JSON on stdin, and it stops when stdin
ends, so that it never outlives its front.
"""

import signal
import sys
import threading
from types import FrameType

import msgspec

from cutlayer.errors import CutlayerError
from cutlayer.identity.admission import Admission
from cutlayer.server.replica_plan import ReplicaPlan
from cutlayer.server.server import TrunkServer
from cutlayer.settings import parse_settings
from cutlayer.wire.grpc_listener import GrpcListener

__all__ = ["NotReady", "Ready", "Replica", "Told", "main", "plan_line", "read_plan"]


class Ready(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """What a replica tells when it listens."""

    port: int
    """For clients."""
    admin_port: int
    """For the front."""


class NotReady(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Why it could not start."""

    code: str
    """An error class of `cutlayer.errors`."""
    message: str


Told = Ready | NotReady


class Replica:
    """From settings to a listening trunk server with a second listener for the front."""

    def __init__(self, plan: ReplicaPlan) -> None:
        """Load the trunk; nothing listens yet.

        Raises:
            ConfigError: wrong settings, model or certificates.
            StorageError: the state folder is in use or open to others.
        """
        self._server = TrunkServer(plan.server)
        admission = Admission(None)
        self._admin = GrpcListener(
            self._server.admin(),
            plan.admin,
            identify=admission.identify,
            is_allowed=lambda peer: admission.is_allowed(peer.serial),
        )

    def start(self) -> Ready:
        """Listen for clients and for the front.

        Raises:
            ConfigError: an address is taken.
        """
        self._server.start()
        self._admin.start()
        return Ready(port=self._server.port, admin_port=self._admin.port)

    def stop(self) -> None:
        """Let calls in flight finish, then close everything."""
        self._server.stop()
        self._admin.stop()


def plan_line(plan: ReplicaPlan) -> str:
    """A plan as one line of JSON; `read_plan` reads it in another process."""
    return plan.model_dump_json(exclude_none=True)


def read_plan(line: str) -> ReplicaPlan:
    """A replica's plan, as its front wrote it."""
    return parse_settings(ReplicaPlan, msgspec.json.decode(line), "the replica's plan")


def main() -> None:
    """Be a replica until stdin ends or SIGTERM comes."""
    ended = _end_signals()
    try:
        replica = Replica(read_plan(sys.stdin.readline()))
        _say(replica.start())
    except CutlayerError as error:
        _say(NotReady(code=type(error).__name__, message=str(error)))
        sys.exit(1)
    threading.Thread(target=_wait_for_end_of_input, args=(ended,), daemon=True).start()
    ended.wait()
    replica.stop()


def _say(what: Told) -> None:
    print(msgspec.json.encode(what).decode(), flush=True)


def _end_signals() -> threading.Event:
    ended = threading.Event()

    def end(number: int, frame: FrameType | None) -> None:
        ended.set()

    signal.signal(signal.SIGTERM, end)
    # Ctrl-C reaches every process of the terminal; the front decides when its replicas drain.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    return ended


def _wait_for_end_of_input(ended: threading.Event) -> None:
    while sys.stdin.readline():
        pass
    ended.set()


if __name__ == "__main__":
    main()
