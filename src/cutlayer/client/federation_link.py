"""Calls to a federation's coordinator: each waits until there is an answer.

It does not train or decide; only a `ReleasedUpdate` can carry tensors.
"""

from collections.abc import Mapping
from typing import TypeVar

from torch import Tensor

from cutlayer.client.link import Link, header_of
from cutlayer.privacy.update_gate import ReleasedUpdate
from cutlayer.wire.federation_messages import (
    Adopt,
    Adopted,
    EnterRound,
    Join,
    Joined,
    Leave,
    Left,
    PeerKeys,
    PeerSecrets,
    Publish,
    Published,
    Round,
    SendUpdate,
    ShareKeys,
    ShareSecrets,
    Unmask,
    Unmasked,
    UpdateTaken,
    Wait,
)
from cutlayer.wire.frame import Frame
from cutlayer.wire.header import Header
from cutlayer.wire.messages import Kind
from cutlayer.wire.packed import Packed
from cutlayer.wire.ring import decode_any

__all__ = ["FederationLink"]

H = TypeVar("H", bound=Header)


class FederationLink:
    """One method per call; used from one thread.

    Every call may raise what the coordinator refuses with, and TransportError when it stays away.
    """

    def __init__(self, link: Link) -> None:
        """
        Args:
            link: to the server itself, not to one of its replicas.
        """
        self._link = link

    @property
    def bytes_sent(self) -> int:
        """Bytes of frames sent, over all connections."""
        return self._link.bytes_sent

    @property
    def bytes_received(self) -> int:
        """Bytes of frames received, over all connections."""
        return self._link.bytes_received

    def join(self, call: Join) -> Joined:
        """Become a member."""
        return self._call(Kind.JOIN, call, Joined)

    def enter_round(self, call: EnterRound) -> tuple[Round, dict[str, Tensor]]:
        """The next round, or the end; with the global adapters of head and tail."""
        reply = self._answered(Kind.ENTER_ROUND, call)
        tensors = {name: decode_any(packed).clone() for name, packed in reply.tensors.items()}
        return header_of(reply, Round), tensors

    def share_keys(self, call: ShareKeys) -> PeerKeys:
        """Show fresh public keys; those of the neighbours."""
        return self._call(Kind.SHARE_KEYS, call, PeerKeys)

    def share_secrets(self, call: ShareSecrets) -> PeerSecrets:
        """Leave encrypted shares for the neighbours; theirs."""
        return self._call(Kind.SHARE_SECRETS, call, PeerSecrets)

    def send_update(self, call: SendUpdate, update: ReleasedUpdate) -> UpdateTaken:
        """Hand in what the member learnt; who else did."""
        return self._call(Kind.SEND_UPDATE, call, UpdateTaken, update.tensors)

    def unmask(self, call: Unmask) -> None:
        """Hand in the shares that open the sum."""
        self._call(Kind.UNMASK, call, Unmasked)

    def publish(self, call: Publish) -> None:
        """Show numbers on the federation's page."""
        self._call(Kind.PUBLISH, call, Published)

    def adopt(self, call: Adopt) -> int:
        """Keep the trunk's adapter as a saved step of one's own run; the step."""
        return self._call(Kind.ADOPT, call, Adopted).step

    def leave(self, call: Leave) -> None:
        """Leave the federation."""
        self._call(Kind.LEAVE, call, Left)

    def close(self) -> None:
        """End the connection."""
        self._link.close()

    def _call(
        self, kind: Kind, call: Header, answer: type[H], tensors: Mapping[str, Packed] | None = None
    ) -> H:
        return header_of(self._answered(kind, call, tensors), answer)

    def _answered(
        self, kind: Kind, call: Header, tensors: Mapping[str, Packed] | None = None
    ) -> Frame:
        if not self._link.is_connected:
            self._link.hello()
        while True:
            # The server bounds the waiting: its rounds have deadlines.
            reply = self._link.send(kind, call, tensors).result()
            if not isinstance(reply.header, Wait):
                return reply
            # The server has them; it compares the header.
            tensors = None
