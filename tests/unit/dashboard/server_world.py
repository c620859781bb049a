"""A server and a coordinator's service as the page asks them. They do no work."""

from collections.abc import Sequence

from cutlayer.federation.settings import FederationSettings
from cutlayer.federation.status import Status
from cutlayer.federation.store_reader import StoreReader
from cutlayer.server.replica_group import ReplicaStatus
from cutlayer.wire.replica_messages import Stats

__all__ = ["STATUS", "StandInFederation", "StandInServer"]

STATUS = Status(
    federation="reviews",
    round=4,
    rounds=10,
    stage="updates",
    attempt=1,
    cohort=("amazon", "movies"),
    came=("amazon",),
    waiting=(),
    stopped="",
)


class StandInServer:
    """Implements `ServerLike`."""

    def is_ready(self) -> bool:
        """Yes."""
        return True

    def assurance(self) -> str:
        """The least."""
        return "SIMULATED"

    def metrics(self) -> bytes:
        """One line."""
        return b"cutlayer_runs 2.0\n"

    def stats(self) -> Stats:
        """Different numbers everywhere."""
        return Stats(
            num_tokens=1,
            bytes_up=2,
            bytes_down=3,
            num_waiting=4,
            num_connections=5,
            num_runs=2,
            num_sessions=6,
            cache_bytes=7,
            graph_bytes=8,
        )

    def runs(self) -> Sequence[tuple[str, str, int]]:
        """Two, not in order."""
        return [("nyt", "r2", 7), ("amazon", "r1", 9)]

    def replicas(self) -> Sequence[ReplicaStatus]:
        """One that is down."""
        down = ReplicaStatus(
            index=1, pid=None, address="", num_restarts=3, clients=("nyt", "amazon"), stats=None
        )
        return [down]


class StandInFederation:
    """Implements `FederationLike` over a real store."""

    def __init__(self, store: StoreReader) -> None:
        self.settings = FederationSettings(name="reviews", rounds=10)
        self.store = store

    def status(self) -> Status:
        """In round 5."""
        return STATUS
