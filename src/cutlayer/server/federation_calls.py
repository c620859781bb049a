"""How a connection hands a member's calls to the coordinator: rights and quota first.

It does not answer them (`federation`).
"""

from concurrent.futures import Future
from typing import Protocol

from cutlayer.errors import PermissionRefused, ProtocolError
from cutlayer.federation.cuts import Greeting
from cutlayer.federation.secure.peers import Verifier
from cutlayer.identity.certificates import Role
from cutlayer.identity.signing import CertificateVerifier
from cutlayer.server.audit import Audit
from cutlayer.server.quota import DailyQuota
from cutlayer.server.settings import ServerSettings
from cutlayer.storage.audit_log import AuditEvent
from cutlayer.wire.channel import Peer
from cutlayer.wire.frame import Frame
from cutlayer.wire.messages import Kind

__all__ = ["FEDERATION_KINDS", "FederationCalls", "start_call", "verifier_of"]

FEDERATION_KINDS = frozenset(
    {
        Kind.JOIN,
        Kind.ENTER_ROUND,
        Kind.SHARE_KEYS,
        Kind.SHARE_SECRETS,
        Kind.SEND_UPDATE,
        Kind.UNMASK,
        Kind.LEAVE,
        Kind.PUBLISH,
        Kind.ADOPT,
    }
)
"""What a member may send to a coordinator."""


class FederationCalls(Protocol):
    """A coordinator's service, as connections use it."""

    def submit(self, peer: Peer, frame: Frame, greeting: Greeting | None = None) -> "Future[Frame]":
        """Start a member's call; `greeting` is what its connection agreed on."""

    def arrived(self, peer: Peer) -> None:
        """A connection of this peer was greeted; `lost` follows when it ends."""

    def lost(self, peer: Peer) -> None:
        """A connection that had arrived has ended; its open calls were cancelled."""


def start_call(
    federation: FederationCalls | None,
    peer: Peer,
    frame: Frame,
    quota: DailyQuota,
    audit: Audit,
    greeting: Greeting | None = None,
) -> "Future[Frame]":
    """Check what the peer may do, and start its call.

    Args:
        federation: what this server coordinates.
        peer: who calls.
        frame: the call.
        quota: of a day.
        audit: notes who is refused.
        greeting: what the peer's connection agreed on.

    Raises:
        ProtocolError: this server coordinates no federation, or the call has tensors too many.
        PermissionRefused: the certificate lacks the role, or the day's quota is used up.
    """
    if federation is None:
        raise ProtocolError(
            f"{frame.kind.name}: this server coordinates no federation; remove the [federation] "
            "section from the client's settings, or ask the operator"
        )
    if Role.TRAIN not in peer.roles:
        audit.record(AuditEvent.REFUSED, peer, error=PermissionRefused.__name__)
        raise PermissionRefused(
            f"certificate of {peer.name} has roles {sorted(peer.roles)}, not {Role.TRAIN}; ask "
            "the federation's owner for a certificate with it"
        )
    if frame.tensors and frame.kind is not Kind.SEND_UPDATE:
        raise ProtocolError(f"{frame.kind.name} carries tensors; only SEND_UPDATE has any")
    quota.charge(peer.name, sum(packed.num_bytes for packed in frame.tensors.values()))
    return federation.submit(peer, frame, greeting)


def verifier_of(settings: ServerSettings) -> Verifier | None:
    """Checks members' signatures as they check each other's; None without certificates."""
    tls = settings.listen.tls
    return None if tls is None else CertificateVerifier(tls.authority, settings.revoked)
