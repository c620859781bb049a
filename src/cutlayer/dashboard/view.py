"""What the page shows, as plain values, and the Protocol by which a server tells it.

It reads nothing. No field has a place for a token, a text or a label; a loss is here only when
its owner published it.
"""

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Protocol

from cutlayer.metrics import Totals

__all__ = [
    "FederationView",
    "MemberStatus",
    "MemberView",
    "PageState",
    "PublishedView",
    "Rates",
    "ReplicaView",
    "RoundView",
    "RunView",
    "ServerView",
    "Snapshot",
]


class MemberStatus(StrEnum):
    """What a member is doing."""

    WAITING = "waiting"
    """For the next round."""
    TRAINING = "training"
    """In the cohort of the round that is going on."""
    STRAGGLER = "straggler"
    """Its update of the last round was late or missing."""
    AWAY = "away"
    """Joined, but not connected."""
    LEFT = "left"
    """It said so."""
    JOINED = "joined"
    """What it does is not known: the server is not asked, only its store."""


@dataclass(frozen=True, kw_only=True)
class MemberView:
    """One member; it is named by its certificate."""

    name: str
    status: MemberStatus
    num_rounds: int = 0
    """Finished rounds that hold its update."""
    num_missed: int = 0
    """Rounds that asked for it and ended without it."""
    last_seen_s: float | None = None
    """Unix time."""


@dataclass(frozen=True, kw_only=True)
class RoundView:
    """One finished round."""

    round: int
    num_survivors: int
    num_cohort: int
    stragglers: tuple[str, ...] = ()
    """Who was asked and did not answer in time."""
    num_attempts: int = 1
    seconds: float | None = None
    total_weight: float = 0
    """Scored tokens; 0 where the server does not know."""
    bytes_up: int = 0
    """Of its last attempt's federation calls, as they travelled."""
    bytes_down: int = 0
    ended_s: float | None = None
    """Unix time."""


@dataclass(frozen=True, kw_only=True)
class PublishedView:
    """A number that a member chose to show."""

    member: str
    round: int
    name: str
    value: float | None
    """None where it was not finite."""


@dataclass(frozen=True, kw_only=True)
class FederationView:
    """One federation and where its rounds stand."""

    name: str
    strategy: str
    is_secure: bool
    """Updates come as masked integers only."""
    hides_aggregate: bool
    """The server does not learn their sum either."""
    num_rounds: int
    """To train."""
    round: int
    """Going on, or the last one when finished."""
    attempt: int
    phase: str
    """What the round is at, in words."""
    waits_for: tuple[str, ...] = ()
    """Members whose answer is missing."""
    is_finished: bool = False
    stopped: str = ""
    """Why the federation gave up; empty if it did not."""
    members: tuple[MemberView, ...] = ()
    rounds: tuple[RoundView, ...] = ()
    """Finished ones, ascending; perhaps the newest only."""
    published: tuple[PublishedView, ...] = ()
    """Ascending by round."""


@dataclass(frozen=True, kw_only=True)
class RunView:
    """One training run in the server's memory."""

    owner: str
    run_id: str
    step: int


@dataclass(frozen=True, kw_only=True)
class ReplicaView:
    """One copy of the trunk in a hierarchical server."""

    name: str
    is_alive: bool
    members: tuple[str, ...] = ()
    """Clients that are placed on it."""
    num_restarts: int = 0


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """A server at one moment."""

    software: str
    time_s: float
    """Unix time of this picture."""
    uptime_s: float
    is_ready: bool
    num_connections: int = 0
    num_sessions: int = 0
    cache_bytes: int = 0
    """KV bytes reserved by sessions."""
    graph_bytes: int = 0
    """Activations that wait for their BACKWARD."""
    totals: Totals = field(default_factory=Totals)
    runs: tuple[RunView, ...] = ()
    replicas: tuple[ReplicaView, ...] = ()
    federation: FederationView | None = None
    assurance: str = "none"
    """What its own evidence is worth (`tee.assurance`); none where it proves nothing."""


@dataclass(frozen=True, kw_only=True)
class Rates:
    """Throughput over the last seconds."""

    tokens_per_s: float = 0.0
    bytes_up_per_s: float = 0.0
    bytes_down_per_s: float = 0.0


@dataclass(frozen=True, kw_only=True)
class PageState:
    """What `/api/state` answers."""

    server: Snapshot
    rates: Rates


class ServerView(Protocol):
    """What a server tells the page. Any thread may call; nothing may wait long."""

    def is_ready(self) -> bool:
        """Whether it takes calls."""

    def metrics(self) -> bytes:
        """Prometheus text."""

    def totals(self) -> Totals:
        """Counters since the start; asked once a second."""

    def snapshot(self) -> Snapshot:
        """Everything else."""
