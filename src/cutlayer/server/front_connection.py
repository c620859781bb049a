"""One client's connection to a front: the handshake with a place in it, and a federation's calls.

It does not compute, nor hold runs or sessions: those are on the replica that it names.
"""

from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, replace
from typing import Protocol

from cutlayer.errors import PermissionRefused, ProtocolError
from cutlayer.identity.certificates import Role
from cutlayer.model.agreement import agree
from cutlayer.server.audit import Audit
from cutlayer.server.connection import ServedModel
from cutlayer.server.quota import DailyQuota
from cutlayer.storage.audit_log import AuditEvent
from cutlayer.wire.channel import Peer
from cutlayer.wire.codec import get_codec
from cutlayer.wire.frame import Frame
from cutlayer.wire.messages import Hello, Kind, Welcome
from cutlayer.wire.spec import Spec, compare

__all__ = ["FederationCalls", "FrontConnection", "FrontDesk"]

_FEDERATION = range(Kind.JOIN, Kind.WAIT)


class FederationCalls(Protocol):
    """A coordinator's service, as connections use it."""

    def submit(self, peer: Peer, frame: Frame) -> "Future[Frame]":
        """Start a call of a federation (JOIN to PUBLISH)."""

    def lost(self, peer: Peer) -> None:
        """A connection of this peer has ended."""

    def close(self) -> None:
        """Answer no more."""


@dataclass(frozen=True, kw_only=True)
class FrontDesk:
    """What all connections of a front share."""

    model: ServedModel
    place: Callable[[str], str]
    """Client's name to the host:port of its replica."""
    federation: FederationCalls | None
    quota: DailyQuota
    audit: Audit


class FrontConnection:
    """Implements `wire.channel.Connection` for one peer."""

    def __init__(self, peer: Peer, desk: FrontDesk) -> None:
        self._peer = peer
        self._desk = desk
        self._is_greeted = False

    def submit(self, frame: Frame) -> "Future[Frame]":
        """Start answering a frame.

        Raises:
            ProtocolError: a call before HELLO, or one that is a replica's.
            PermissionRefused: the certificate lacks the role, or the day's quota is used up.
            TransportError: no replica is up.
        """
        if isinstance(frame.header, Hello):
            return self._welcome(frame.header)
        if not self._is_greeted:
            raise ProtocolError(f"{frame.kind.name} before HELLO; the handshake comes first")
        if frame.kind not in _FEDERATION:
            raise ProtocolError(
                f"{frame.kind.name} is a replica's: this server computes nothing by itself, "
                "connect to the place that WELCOME names"
            )
        return self._federation_call(frame)

    def close(self) -> None:
        """The stream ended. The client's place stays: it may come back."""
        if self._desk.federation is not None and self._is_greeted:
            self._desk.federation.lost(self._peer)
        self._desk.audit.record(AuditEvent.DISCONNECTED, self._peer)

    def _welcome(self, hello: Hello) -> "Future[Frame]":
        model = self._desk.model
        theirs = Spec.from_table(hello.spec)
        for codec in (theirs.codec_up, theirs.codec_down):
            get_codec(codec)
        own = replace(model.spec, codec_up=theirs.codec_up, codec_down=theirs.codec_down)
        compare(own, theirs)
        whole = agree(model.manifest, hello.leaves, model.digest)
        place = self._desk.place(self._peer.name)
        if not self._is_greeted:
            self._desk.audit.record(AuditEvent.CONNECTED, self._peer, spec=whole.root())
        self._is_greeted = True
        welcome = Welcome(
            boot_id=model.boot_id,
            spec=own.to_table(),
            leaves=dict(model.manifest.leaves),
            software=model.software,
            place=place,
        )
        future: Future[Frame] = Future()
        future.set_result(Frame(Kind.WELCOME, welcome))
        return future

    def _federation_call(self, frame: Frame) -> "Future[Frame]":
        if self._desk.federation is None:
            raise ProtocolError(f"{frame.kind.name}: this server coordinates no federation")
        if Role.TRAIN not in self._peer.roles:
            self._desk.audit.record(
                AuditEvent.REFUSED, self._peer, error=PermissionRefused.__name__
            )
            raise PermissionRefused(
                f"certificate of {self._peer.name} has roles {sorted(self._peer.roles)}, not "
                f"{Role.TRAIN}; ask the federation's owner for a certificate with it"
            )
        num_bytes = sum(packed.num_bytes for packed in frame.tensors.values())
        self._desk.quota.charge(self._peer.name, num_bytes)
        return self._desk.federation.submit(self._peer, frame)
