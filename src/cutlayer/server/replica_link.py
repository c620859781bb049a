"""The front's end of the link to one replica: its orders as calls.

It does not choose replicas (`replica_group`) nor start them (`launchers`). A broken link stays
broken: the replica is then started again and gets a new one.
"""

from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from typing import TypeVar

from cutlayer.errors import ProtocolError
from cutlayer.federation.trunk_pool import TrunkUpdate, UpdateKind
from cutlayer.model.adapters import AdapterSettings, AdapterState
from cutlayer.server.replica_admin import pack_state, unpack_state
from cutlayer.wire.channel import Channel
from cutlayer.wire.frame import Frame
from cutlayer.wire.header import Header
from cutlayer.wire.messages import Kind, Welcome
from cutlayer.wire.packed import Packed
from cutlayer.wire.replica_messages import (
    AdapterLayout,
    BeginRound,
    Collect,
    Collected,
    Describe,
    EndRound,
    Layout,
    RoundBegun,
    RoundEnded,
    Stats,
    TakeStats,
)

__all__ = ["ReplicaLink", "update_of"]

H = TypeVar("H", bound=Header)


class ReplicaLink:
    """Calls of one running replica. Thread-safe, as its channel is."""

    def __init__(self, channel: Channel) -> None:
        """Speak over an open channel, which this closes at the end."""
        self._channel = channel

    def describe(self) -> Welcome:
        """Which model and cut it serves."""
        return _header(self._call(Kind.DESCRIBE, Describe()).result(), Welcome)

    def stats(self, timeout_s: float) -> Stats:
        """Its load.

        Raises:
            TimeoutError: it has not answered.
        """
        return _header(self._call(Kind.TAKE_STATS, TakeStats()).result(timeout_s), Stats)

    def layout(self, adapter: AdapterSettings) -> Mapping[str, Sequence[int]]:
        """Key and shape of every tensor that an adapter has on its trunk."""
        call = AdapterLayout(adapter=adapter.model_dump(mode="json"))
        return _header(self._call(Kind.ADAPTER_LAYOUT, call).result(), Layout).shapes

    def begin_round(
        self, run_id: str, adapter: AdapterSettings, members: Sequence[str], state: AdapterState
    ) -> None:
        """These members' runs of the round start from `state`."""
        table = adapter.model_dump(mode="json")
        call = BeginRound(run_id=run_id, adapter=table, members=list(members))
        _header(self._call(Kind.BEGIN_ROUND, call, pack_state(state)).result(), RoundBegun)

    def start_collect(self, run_id: str, member: str, kind: UpdateKind) -> "Future[Frame]":
        """Ask for a member's contribution; `update_of` reads the answer."""
        return self._call(Kind.COLLECT, Collect(run_id=run_id, member=member, kind=kind.value))

    def end_round(self, run_id: str) -> None:
        """Forget the round's runs."""
        _header(self._call(Kind.END_ROUND, EndRound(run_id=run_id)).result(), RoundEnded)

    def close(self) -> None:
        """End the connection; calls in flight fail with TransportError."""
        self._channel.close()

    def _call(
        self, kind: Kind, header: Header, tensors: Mapping[str, Packed] | None = None
    ) -> "Future[Frame]":
        return self._channel.call(Frame(kind=kind, header=header, tensors=tensors or {}))


def update_of(reply: Frame) -> TrunkUpdate | None:
    """What COLLECT brought; None where the member contributed nothing."""
    header = _header(reply, Collected)
    if not header.is_present:
        return None
    return TrunkUpdate(state=unpack_state(reply.tensors), weight=header.weight)


def _header(frame: Frame, kind: type[H]) -> H:
    if not isinstance(frame.header, kind):
        raise ProtocolError(f"a replica answered {frame.kind.name}, expected {kind.__name__}")
    return frame.header
