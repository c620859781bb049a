"""A replica's orders from its front: which frames it takes and what it answers.

It does not serve members (`connection`) nor listen (`replica`). What touches the trunk runs on the
runner's thread; the rest is answered at once, so that an answer shows that the process lives.
"""

from collections.abc import Callable, Mapping
from concurrent.futures import Future
from typing import Protocol

from cutlayer.errors import PermissionRefused, ProtocolError
from cutlayer.federation.trunk_pool import TrunkUpdate, UpdateKind
from cutlayer.identity.certificates import Role
from cutlayer.model.adapters import AdapterSettings, AdapterState
from cutlayer.server.handshake import ServedModel
from cutlayer.server.runner import Runner
from cutlayer.settings import parse_settings
from cutlayer.wire.channel import Peer
from cutlayer.wire.codec import decode, get_codec
from cutlayer.wire.frame import Frame
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

__all__ = ["AdminService", "RoundHost", "pack_state", "unpack_state"]


class RoundHost(Protocol):
    """The trunk's part in rounds; called on the runner's thread."""

    def adapter_layout(self, adapter: AdapterSettings) -> Mapping[str, list[int]]:
        """Key and shape of every tensor."""

    def begin_round(
        self, run_id: str, adapter: AdapterSettings, states: Mapping[str, AdapterState]
    ) -> None:
        """Members' runs of this round start from these; called again, it adds members."""

    def collect(
        self, run_id: str, members: list[str], kind: UpdateKind
    ) -> Mapping[str, TrunkUpdate]:
        """What the members' runs have learnt."""

    def end_round(self, run_id: str) -> None:
        """Forget the round's runs."""


class AdminService:
    """Implements `wire.channel.Service` for the front alone."""

    def __init__(
        self, model: ServedModel, host: RoundHost, runner: Runner, stats: Callable[[], Stats]
    ) -> None:
        """Args:
        model: what the replica serves.
        host: where rounds happen.
        runner: the thread that may call it.
        stats: the replica's load; called on any thread.
        """
        self.model = model
        self.host = host
        self.runner = runner
        self.stats = stats

    def connect(self, peer: Peer) -> "_AdminConnection":
        """Accept the front.

        Raises:
            PermissionRefused: the peer's certificate lacks the role `serve`.
        """
        if Role.SERVE not in peer.roles:
            raise PermissionRefused(
                f"{peer.name} may not give orders to a replica: its certificate lacks the role "
                f"{Role.SERVE}"
            )
        return _AdminConnection(self)


class _AdminConnection:
    """One connection of the front."""

    def __init__(self, service: AdminService) -> None:
        self._service = service

    def submit(self, frame: Frame) -> "Future[Frame]":
        """Start an order.

        Raises:
            ProtocolError: a frame that is no order.
        """
        match frame.header:
            case Describe():
                return _done(Frame(Kind.WELCOME, _welcome(self._service.model)))
            case TakeStats():
                return _done(Frame(Kind.STATS, self._service.stats()))
            case AdapterLayout() | BeginRound() | Collect() | EndRound():
                return self._service.runner.submit("", 0, lambda: self._answer(frame))
            case _:
                raise ProtocolError(f"{frame.kind.name} is no order for a replica")

    def close(self) -> None:
        """The front has gone; rounds stay until they are ended or the process is."""

    def _answer(self, frame: Frame) -> Frame:
        match frame.header:
            case AdapterLayout() as call:
                return self._layout(call)
            case BeginRound() as call:
                return self._begin(call, unpack_state(frame.tensors))
            case Collect() as call:
                return self._collect(call)
            case EndRound() as call:
                self._service.host.end_round(call.run_id)
        return Frame(Kind.ROUND_ENDED, RoundEnded())

    def _layout(self, call: AdapterLayout) -> Frame:
        shapes = self._service.host.adapter_layout(_adapter(call.adapter))
        header = Layout(shapes={key: list(shape) for key, shape in shapes.items()})
        return Frame(Kind.LAYOUT, header)

    def _begin(self, call: BeginRound, state: AdapterState) -> Frame:
        states = dict.fromkeys(call.members, state)
        self._service.host.begin_round(call.run_id, _adapter(call.adapter), states)
        return Frame(Kind.ROUND_BEGUN, RoundBegun())

    def _collect(self, call: Collect) -> Frame:
        try:
            kind = UpdateKind(call.kind)
        except ValueError as error:
            raise ProtocolError(f"COLLECT of unknown kind {call.kind!r:.40}") from error
        update = self._service.host.collect(call.run_id, [call.member], kind).get(call.member)
        if update is None:
            return Frame(Kind.COLLECTED, Collected(is_present=False, weight=0))
        header = Collected(is_present=True, weight=update.weight)
        return Frame(Kind.COLLECTED, header, pack_state(update.state))


def pack_state(state: AdapterState) -> dict[str, Packed]:
    """An adapter as it travels between front and replica: every bit of it."""
    codec = get_codec("raw")
    return {key: codec.encode(tensor) for key, tensor in state.items()}


def unpack_state(tensors: Mapping[str, Packed]) -> AdapterState:
    """An adapter that came, in memory of its own."""
    return {key: decode(packed).clone() for key, packed in tensors.items()}


def _adapter(table: Mapping[str, object]) -> AdapterSettings:
    return parse_settings(AdapterSettings, table, "the round's adapter settings")


def _welcome(model: ServedModel) -> Welcome:
    return Welcome(
        boot_id=model.boot_id,
        spec=model.spec.to_table(),
        leaves=dict(model.manifest.leaves),
        software=model.software,
    )


def _done(frame: Frame) -> "Future[Frame]":
    future: Future[Frame] = Future()
    future.set_result(frame)
    return future
