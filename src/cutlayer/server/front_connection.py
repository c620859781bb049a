"""One client's connection to a front: the handshake with a place in it, and a federation's calls.

It does not compute, nor hold runs or sessions: those are on the replica that it names.
"""

from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass

import msgspec

from cutlayer.errors import ProtocolError
from cutlayer.federation.cuts import Greeting
from cutlayer.server.attestation import ServerAttestation, peer_attestation
from cutlayer.server.audit import Audit
from cutlayer.server.federation_calls import FEDERATION_KINDS, FederationCalls, start_call
from cutlayer.server.handshake import ServedModel, agree_on
from cutlayer.server.quota import DailyQuota
from cutlayer.storage.audit_log import AuditEvent
from cutlayer.wire.channel import Peer
from cutlayer.wire.frame import Frame
from cutlayer.wire.messages import Hello, Kind

__all__ = ["FrontConnection", "FrontDesk"]


@dataclass(frozen=True, kw_only=True)
class FrontDesk:
    """What all connections of a front share."""

    model: ServedModel
    place: Callable[[str], str]
    """Client's name to the host:port of its replica."""
    federation: FederationCalls | None
    quota: DailyQuota
    audit: Audit
    attestation: ServerAttestation | None = None


class FrontConnection:
    """Implements `wire.channel.Connection` for one peer."""

    def __init__(self, peer: Peer, desk: FrontDesk) -> None:
        self._peer = peer
        self._desk = desk
        self._attestation = peer_attestation(desk.attestation, peer)
        self._greeting: Greeting | None = None
        self._calls: set[Future[Frame]] = set()

    def submit(self, frame: Frame) -> "Future[Frame]":
        """Start answering a frame.

        Raises:
            ProtocolError: a call before HELLO, or one that is a replica's.
            PermissionRefused: the certificate lacks the role, or the day's quota is used up.
            TransportError: no replica is up.
            AttestationError: the client has to prove what it runs first.
        """
        if isinstance(frame.header, Hello):
            return self._welcome(frame.header)
        if self._greeting is None:
            raise ProtocolError(f"{frame.kind.name} before HELLO; the handshake comes first")
        shown = self._attestation.answer(frame)
        if shown is not None:
            return _done(shown)
        if frame.kind not in FEDERATION_KINDS:
            raise ProtocolError(
                f"{frame.kind.name} is a replica's: this server computes nothing by itself, "
                "connect to the place that WELCOME names"
            )
        desk = self._desk
        call = start_call(
            desk.federation, self._peer, frame, desk.quota, desk.audit, self._greeting
        )
        self._calls.add(call)
        call.add_done_callback(self._calls.discard)
        return call

    def close(self) -> None:
        """The stream ended. The client's place stays: it may come back."""
        for call in list(self._calls):
            call.cancel()
        if self._desk.federation is not None and self._greeting is not None:
            self._desk.federation.lost(self._peer)
        self._desk.audit.record(AuditEvent.DISCONNECTED, self._peer)

    def _welcome(self, hello: Hello) -> "Future[Frame]":
        agreement = agree_on(self._desk.model, hello)
        welcome = self._attestation.welcome(hello, agreement.welcome)
        # A client of another model is placed nowhere.
        place = self._desk.place(self._peer.name)
        if self._greeting is None:
            self._desk.audit.record(AuditEvent.CONNECTED, self._peer, spec=agreement.root)
            if self._desk.federation is not None:
                self._desk.federation.arrived(self._peer)
        self._greeting = agreement.greeting(self._desk.model)
        return _done(Frame(Kind.WELCOME, msgspec.structs.replace(welcome, place=place)))


def _done(frame: Frame) -> "Future[Frame]":
    future: Future[Frame] = Future()
    future.set_result(frame)
    return future
