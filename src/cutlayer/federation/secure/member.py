"""A member's side of secure aggregation: one object per attempt, without clock or socket.

It does not train or send. What it never does: reveal both secrets of one neighbour, answer two
different lists of survivors, mask two updates with one mask, or share with fewer neighbours than
the policy demands.

Source: Bonawitz et al., "Practical Secure Aggregation for Privacy-Preserving Machine Learning"
(CCS 2017), figure 4; Bell et al. (CCS 2020), algorithm 3. docs/secure-aggregation.md says where
this differs.

Shapes: N = values of an update, M = N + 1 = values and weight.
"""

from secrets import token_bytes

import msgspec
import torch
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from torch import Tensor

from cutlayer.errors import ConfigError, ProtocolError, QuorumNotMet
from cutlayer.federation.secure.attempt import Attempt
from cutlayer.federation.secure.masks import (
    SECRET_BYTES,
    add_pair_mask,
    add_seed_mask,
    agreed_key,
    mask_key_of,
    public_bytes,
)
from cutlayer.federation.secure.peers import Signer, Verifier, checked_peers, signed_keys
from cutlayer.federation.secure.ring import check_headroom, digest_of, quantise
from cutlayer.federation.secure.shares import (
    NO_BUNDLE,
    Bundle,
    Secrets,
    open_envelope,
    seal_envelope,
    split,
)
from cutlayer.federation.secure.unmasking import reveal
from cutlayer.wire.federation_messages import (
    PeerKey,
    PeerKeys,
    PeerSecrets,
    ShareKeys,
    ShareSecrets,
    Unmask,
    UpdateTaken,
)

__all__ = ["SecureMember"]


class SecureMember:
    """The calls in their order; a repeated call with the same content has the same answer."""

    def __init__(
        self,
        name: str,
        attempt: Attempt,
        num_values: int,
        signer: Signer | None = None,
        verifier: Verifier | None = None,
    ) -> None:
        """Make fresh keys and secrets.

        Args:
            name: of this member's certificate.
            attempt: as ROUND described it, under the policy that this member accepted.
            num_values: N, values of an update.
            signer: signs this member's keys; None where there are no certificates.
            verifier: checks the neighbours' keys; None where there are no certificates.

        Raises:
            ConfigError: the policy's numbers do not fit the ring, or only one of signer, verifier.
            QuorumNotMet: fewer than three members are in the cohort.
            ProtocolError: the cohort names somebody twice, or lacks this member.
        """
        if (signer is None) != (verifier is None):
            raise ConfigError("a member either signs and verifies keys, or has no certificates")
        check_headroom(len(attempt.cohort), attempt.policy)
        attempt.graph.neighbours(name)
        self._name, self._attempt, self._num_values = name, attempt, num_values
        self._signer, self._verifier = signer, verifier
        self._secrets = Secrets(
            seed=token_bytes(SECRET_BYTES),
            key=token_bytes(SECRET_BYTES),
            unlock=token_bytes(SECRET_BYTES),
        )
        self._cipher_key = X25519PrivateKey.generate()
        self._mask_key = mask_key_of(self._secrets.key, name, attempt)
        self._own_keys: ShareKeys | None = None
        self._peers: dict[str, PeerKey] = {}
        self._bundles: dict[str, Bundle] = {}
        self._keys: PeerKeys | None = None
        self._shared: ShareSecrets | None = None
        self._taken_secrets: PeerSecrets | None = None
        self._masked: tuple[bytes, Tensor] | None = None
        self._unmasked: tuple[UpdateTaken, Unmask] | None = None
        self.num_clipped = 0
        """Values of the update that were outside the policy's range."""

    def share_keys(self) -> ShareKeys:
        """The first call: fresh public keys, signed."""
        if self._own_keys is None:
            keys = public_bytes(self._cipher_key), public_bytes(self._mask_key)
            self._own_keys = signed_keys(self._name, self._attempt, keys, self._signer)
        return self._own_keys

    def share_secrets(self, keys: PeerKeys) -> ShareSecrets:
        """The second call: shares of this member's secrets, sealed for each neighbour.

        Raises:
            ProtocolError: not this member's neighbours, or not the policy's threshold.
            QuorumNotMet: too few neighbours.
            PermissionRefused: a neighbour's keys are not signed by it.
        """
        if self._shared is None:
            peers = checked_peers(self._name, self._attempt, keys, self._verifier)
            bundles = split(self._secrets, self._name, self._attempt)
            sealed = {name: self._sealed(bundles[name], peer) for name, peer in peers.items()}
            self._bundles = {self._name: bundles[self._name]}
            self._peers, self._keys = dict(peers), keys
            self._shared = ShareSecrets(
                federation=self._attempt.federation,
                round=self._attempt.round,
                attempt=self._attempt.attempt,
                sealed=sealed,
            )
        self._same(keys, self._keys, "PEER_KEYS")
        return self._shared

    def take_secrets(self, secrets: PeerSecrets) -> None:
        """Open the shares that neighbours sealed for this member; these are its mask partners.

        Raises:
            ProtocolError: out of order, or from a stranger.
            QuorumNotMet: too few neighbours whose shares can be used.
        """
        self._require(self._shared is not None, "PEER_SECRETS", "PEER_KEYS")
        if self._taken_secrets is not None:
            return self._same(secrets, self._taken_secrets, "PEER_SECRETS")
        strangers = set(secrets.sealed) - set(self._peers)
        if strangers:
            raise ProtocolError(f"shares from {_some(strangers)}, who sent no keys")
        opened = {name: self._opened(name, sealed) for name, sealed in secrets.sealed.items()}
        bad = {name for name, bundle in opened.items() if bundle is None}
        spoilt = f" (those of {_some(bad)} are not for it or no shares)" if bad else ""
        self._need(len(opened) - len(bad) + 1, f"shared secrets{spoilt}")
        # A neighbour that shares nonsense is a mask partner all the same: others hold its shares.
        self._bundles |= {name: bundle or NO_BUNDLE for name, bundle in opened.items()}
        self._taken_secrets = secrets

    def mask(self, values_N: Tensor, weight: int, pad_M: Tensor | None = None) -> Tensor:
        """The update as masked ring elements, int64 [M]; only the sum with all others' tells.

        Args:
            values_N: the update, on any device.
            weight: scored tokens.
            pad_M: added first where the sum stays hidden from the server (`hidden.pad`).

        Raises:
            DataError: a value is NaN or infinite.
            ConfigError: another number of values than agreed.
            ProtocolError: out of order, or another update was masked in this attempt.
        """
        self._require(self._taken_secrets is not None, "the update", "PEER_SECRETS")
        if values_N.numel() != self._num_values:
            raise ConfigError(
                f"an update of {values_N.numel()} values; the federation's has {self._num_values}"
            )
        quantised = quantise(values_N, weight, self._attempt.policy)
        vector_M = quantised.vector_M if pad_M is None else quantised.vector_M + pad_M
        digest = digest_of(vector_M)
        if self._masked is None:
            self.num_clipped = quantised.num_clipped
            self._masked = digest, self._with_masks(vector_M)
        self._same(digest, self._masked[0], "an update")
        return self._masked[1]

    def unmask(self, taken: UpdateTaken) -> Unmask:
        """The last call: one share per neighbour, of the seed or of the key.

        Raises:
            ProtocolError: out of order, not this member's mask partners, a neighbour in both
                lists or in none, or another list than before.
            QuorumNotMet: too few survivors.
        """
        self._require(self._masked is not None, "UPDATE_TAKEN", "the update")
        if self._unmasked is None:
            self._check_lists(taken)
            unlock = self._secrets.unlock
            answer = reveal(self._name, self._attempt, unlock, self._bundles, taken)
            self._unmasked = taken, answer
        self._same(taken, self._unmasked[0], "UPDATE_TAKEN")
        return self._unmasked[1]

    def _check_lists(self, taken: UpdateTaken) -> None:
        survivors, dropped = set(taken.survivors), set(taken.dropped)
        partners = set(self._bundles) - {self._name}
        both = survivors & dropped
        if both:
            raise ProtocolError(
                f"the server names {_some(both)} as survivor and as dropped; with both secrets it "
                "could read that update, so this member reveals nothing"
            )
        if (survivors | dropped) != partners or not taken.is_secure:
            odd = (survivors | dropped) ^ partners
            raise ProtocolError(
                f"the server's lists of survivors and dropped do not fit this member's mask "
                f"partners ({_some(odd) or 'not secure'}); it reveals nothing"
            )
        self._need(len(survivors) + 1, "sent updates")

    def _with_masks(self, vector_M: Tensor) -> Tensor:
        total_M = vector_M.clone(memory_format=torch.contiguous_format)
        add_seed_mask(total_M, self._secrets.seed, self._name, self._attempt, 1)
        for name in self._bundles:
            if name != self._name:
                peer = name, self._peers[name].mask_key
                add_pair_mask(total_M, self._mask_key, self._name, peer, self._attempt)
        return total_M

    def _sealed(self, bundle: Bundle, peer: PeerKey) -> bytes:
        binding = self._attempt.binding("shares", self._name, peer.member)
        key = agreed_key(self._cipher_key, peer.cipher_key, peer.member, binding)
        return seal_envelope(key, msgspec.msgpack.encode(bundle), binding)

    def _opened(self, sender: str, sealed: bytes) -> Bundle | None:
        """The shares; None if they are not for this attempt and member, or are none."""
        binding = self._attempt.binding("shares", sender, self._name)
        key = agreed_key(self._cipher_key, self._peers[sender].cipher_key, sender, binding)
        data = open_envelope(key, sealed, binding)
        if data is None:
            return None
        try:
            bundle = msgspec.msgpack.decode(data, type=Bundle)
        except msgspec.DecodeError:
            return None
        return bundle if bundle.has_sizes_of(NO_BUNDLE) else None

    def _need(self, num_found: int, did: str) -> None:
        if num_found < self._attempt.threshold:
            raise QuorumNotMet(
                f"{num_found} of {self._name} and its {self._attempt.graph.degree} neighbours "
                f"{did}; {self._attempt.threshold} are needed, so it reveals nothing"
            )

    def _require(self, is_done: bool, what: str, before: str) -> None:
        if not is_done:
            raise ProtocolError(f"{what} came before {before}: the steps have one order")

    def _same(self, given: object, known: object, what: str) -> None:
        if given != known:
            raise ProtocolError(
                f"{what} came twice in attempt {self._attempt.attempt} of round "
                f"{self._attempt.round}, with different content; this member answers the first only"
            )


def _some(names: set[str]) -> str:
    return ", ".join(sorted(names)[:3])[:200]
