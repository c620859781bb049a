"""What the front of a hierarchical server says to its replicas; the spec is docs/wire.md.

It decides nothing (`server.front`, `server.replica`). No member ever sends or gets one of these.
"""

from cutlayer.wire.header import Header

__all__ = [
    "AdapterLayout",
    "BeginRound",
    "Collect",
    "Collected",
    "Describe",
    "EndRound",
    "Layout",
    "RoundBegun",
    "RoundEnded",
    "Stats",
    "TakeStats",
]

AdapterTable = dict[str, str | int | float | bool | list[str] | dict[str, str | int | float]]


class Describe(Header, frozen=True, kw_only=True):
    """Ask which model and cut the replica serves; answered by WELCOME."""


class TakeStats(Header, frozen=True, kw_only=True):
    """Ask for the replica's load; its answer also shows that the process is alive."""


class Stats(Header, frozen=True, kw_only=True):
    """What the replica does now."""

    num_tokens: int
    """Rows' tokens that its trunk was sent since the process started."""
    bytes_up: int
    """Tensors from clients since then, as they travelled."""
    bytes_down: int
    """Tensors to clients."""
    num_waiting: int
    """Calls that wait for its trunk."""
    num_connections: int
    num_runs: int
    """Training runs in memory."""
    num_sessions: int
    """Generation sessions."""
    cache_bytes: int
    """KV bytes reserved by sessions."""
    graph_bytes: int
    """Activations that wait for their BACKWARD."""


class AdapterLayout(Header, frozen=True, kw_only=True):
    """Ask for key and shape of every tensor that an adapter would have on this trunk."""

    adapter: AdapterTable
    """Adapter settings, as `AdapterSettings.model_dump()`."""


class Layout(Header, frozen=True, kw_only=True):
    """Shapes by key."""

    shapes: dict[str, list[int]]


class BeginRound(Header, frozen=True, kw_only=True):
    """Members whose runs of this round start from the adapter that comes along.

    Tensors: the trunk adapter's state. Sent once for all members with the same state; members that
    the replica knows already keep what they have unless they are named again.
    """

    run_id: str
    """`federation_messages.round_run_id`."""
    adapter: AdapterTable
    members: list[str]


class RoundBegun(Header, frozen=True, kw_only=True):
    """Done."""


class Collect(Header, frozen=True, kw_only=True):
    """Ask for what one member's run of a round has learnt."""

    run_id: str
    member: str
    kind: str
    """`delta` or `gradient`: see `federation.trunk_pool`."""


class Collected(Header, frozen=True, kw_only=True):
    """Tensors: the state; none where the member contributed nothing."""

    is_present: bool
    weight: int
    """Scored tokens."""


class EndRound(Header, frozen=True, kw_only=True):
    """Forget the round's runs."""

    run_id: str


class RoundEnded(Header, frozen=True, kw_only=True):
    """Done."""
