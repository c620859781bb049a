"""Public keys of an attempt: signed by their member, checked by the neighbours.

It does not agree on masks. The signature is what keeps a lying server from putting its own keys
between two members, so a member that can verify refuses a neighbour that did not sign.
"""

from collections.abc import Mapping
from typing import Protocol

from cutlayer.errors import PermissionRefused, ProtocolError, QuorumNotMet
from cutlayer.federation.secure.attempt import Attempt
from cutlayer.wire.federation_messages import PeerKey, PeerKeys, ShareKeys

__all__ = ["Signer", "Verifier", "check_signature", "checked_peers", "signed_keys"]


class Signer(Protocol):
    """Signs as one member, with the key of its certificate."""

    @property
    def certificate(self) -> bytes:
        """The member's certificate, DER."""

    def sign(self, data: bytes) -> bytes:
        """Sign `data`."""


class Verifier(Protocol):
    """Knows whose certificates count."""

    def verify(self, member: str, certificate: bytes, data: bytes, signature: bytes) -> None:
        """Check that `member` signed `data` under a certificate that the authority issued to it.

        Raises:
            PermissionRefused: it did not, or the certificate is expired, revoked or another's.
        """


def signed_keys(
    name: str, attempt: Attempt, keys: tuple[bytes, bytes], signer: Signer | None
) -> ShareKeys:
    """What a member sends first.

    Args:
        name: the member.
        attempt: what the keys are for.
        keys: public cipher key and public mask key.
        signer: None where there are no certificates (plaintext on loopback).
    """
    cipher_key, mask_key = keys
    return ShareKeys(
        federation=attempt.federation,
        round=attempt.round,
        attempt=attempt.attempt,
        cipher_key=cipher_key,
        mask_key=mask_key,
        certificate=b"" if signer is None else signer.certificate,
        signature=b"" if signer is None else signer.sign(_signed(name, attempt, *keys)),
    )


def checked_peers(
    name: str, attempt: Attempt, keys: PeerKeys, verifier: Verifier | None
) -> Mapping[str, PeerKey]:
    """The neighbours' keys by name, once all are what they have to be.

    Args:
        name: who checks.
        attempt: says who its neighbours are and what opens a secret.
        keys: as the server sent them.
        verifier: None where there are no certificates.

    Raises:
        ProtocolError: a stranger, a name twice, or another threshold than the policy's.
        QuorumNotMet: too few neighbours.
        PermissionRefused: a neighbour's keys are not signed by it.
    """
    if keys.threshold != attempt.threshold:
        raise ProtocolError(
            f"the server says that {keys.threshold} shares open a secret, the federation's policy "
            f"{attempt.threshold}; this member shares nothing"
        )
    peers = {peer.member: peer for peer in keys.peers}
    strangers = set(peers) - set(attempt.graph.neighbours(name))
    if strangers or len(peers) != len(keys.peers):
        who = ", ".join(sorted(strangers)[:3]) or "one name twice"
        raise ProtocolError(f"the server named neighbours that are none of {name}'s: {who[:200]}")
    if len(peers) + 1 < attempt.threshold:
        raise QuorumNotMet(
            f"{len(peers)} of {name}'s {attempt.graph.degree} neighbours sent keys; with itself "
            f"{attempt.threshold} are needed, so it shares nothing"
        )
    if verifier is not None:
        for peer in peers.values():
            check_signature(peer, attempt, verifier)
    return peers


def check_signature(peer: PeerKey, attempt: Attempt, verifier: Verifier) -> None:
    """Check that a member's keys are its own.

    Raises:
        PermissionRefused: they are not signed, or not by it.
    """
    if not peer.certificate or not peer.signature:
        raise PermissionRefused(
            f"the keys of {peer.member} are not signed; nobody shares anything with it"
        )
    data = _signed(peer.member, attempt, peer.cipher_key, peer.mask_key)
    verifier.verify(peer.member, peer.certificate, data, peer.signature)


def _signed(name: str, attempt: Attempt, cipher_key: bytes, mask_key: bytes) -> bytes:
    return attempt.binding("keys", name, cipher_key, mask_key)
