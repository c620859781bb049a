"""What the server computes from UNMASK: the masks that did not cancel.

It does not know the protocol's steps (`server`). Every secret is recognised before it is used: an
unlock secret by the envelopes it opens, a seed by its digest, a key by its public half. So a wrong
share is survived while there are spare ones, and named when there are none.

Shapes: M = values of the masked sum.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from functools import partial

from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from cutlayer.errors import ProtocolError
from cutlayer.federation.secure.attempt import Attempt
from cutlayer.federation.secure.masks import mask_key_of, public_bytes
from cutlayer.federation.secure.shares import join, seed_digest
from cutlayer.federation.secure.unmasking import (
    is_opened_by,
    read_key_share,
    read_seed_share,
    unlock_share,
)
from cutlayer.wire.federation_messages import Unmask

__all__ = ["Recovery"]


class Recovery:
    """The secrets that members' answers open."""

    def __init__(self, attempt: Attempt, answers: Mapping[str, Unmask]) -> None:
        """Open the answers.

        Args:
            attempt: says who holds which share.
            answers: by member; their entries are exactly those that were asked for.
        """
        self._attempt, self._answers = attempt, answers
        self._unlocks = {name: self._unlock(name) for name in answers}

    def seed(self, owner: str) -> bytes:
        """A survivor's seed.

        Raises:
            ProtocolError: too few shares can be read, or they do not fit together.
        """
        shares, digests = {}, Counter[bytes]()
        for holder, unlock, answer in self._helpers(owner):
            if owner in answer.seed_shares:
                read = read_seed_share(unlock, holder, answer, owner, self._attempt)
                if read is not None:
                    shares[holder], digest = read
                    digests[digest] += 1
        is_right = partial(_is_seed, digests, owner, self._attempt)
        return self._joined(shares, owner, "seed", is_right)

    def mask_key(self, owner: str, public: bytes) -> X25519PrivateKey:
        """A dropped member's private mask key.

        Args:
            owner: the member.
            public: the public key that it sent.

        Raises:
            ProtocolError: too few shares can be read, or they fit neither together nor the public
                key.
        """
        shares = {}
        for holder, unlock, answer in self._helpers(owner):
            if owner in answer.key_shares:
                share = read_key_share(unlock, holder, answer, owner, self._attempt)
                if share is not None:
                    shares[holder] = share
        is_right = partial(_is_key, public, owner, self._attempt)
        secret = self._joined(shares, owner, "mask key", is_right)
        return mask_key_of(secret, owner, self._attempt)

    def _unlock(self, name: str) -> bytes | None:
        """The secret that opens the answer of `name`; None if too few say that it survived."""
        shares = {
            holder: unlock_share(answer, name)
            for holder, answer in self._answers.items()
            if name in answer.seed_shares
        }
        is_right = partial(
            is_opened_by, name=name, answer=self._answers[name], attempt=self._attempt
        )
        return join(shares, name, self._attempt, is_right)

    def _helpers(self, owner: str) -> Iterator[tuple[str, bytes, Unmask]]:
        for holder in self._attempt.graph.holders(owner):
            unlock = self._unlocks.get(holder)
            if unlock is not None:
                yield holder, unlock, self._answers[holder]

    def _joined(
        self, shares: Mapping[str, bytes], owner: str, what: str, is_right: Callable[[bytes], bool]
    ) -> bytes:
        attempt = self._attempt
        if len(shares) < attempt.threshold:
            raise ProtocolError(
                f"{len(shares)} readable shares of the {what} of {owner}, {attempt.threshold} open "
                f"it{self._unreadable(owner)}"
            )
        secret = join(shares, owner, attempt, is_right)
        if secret is None:
            raise ProtocolError(
                f"the {len(shares)} shares of the {what} of {owner} do not fit together: {owner} "
                f"or one of {', '.join(sorted(shares))} sent a wrong one"
            )
        return secret

    def _unreadable(self, owner: str) -> str:
        names = [
            holder
            for holder in self._attempt.graph.holders(owner)
            if holder in self._unlocks and self._unlocks[holder] is None
        ]
        return f"; the answers of {', '.join(names)} cannot be read" if names else ""


def _is_seed(digests: Counter[bytes], owner: str, attempt: Attempt, secret: bytes) -> bool:
    """Whether it has the digest that most holders were given; the owner gave all the same."""
    return seed_digest(secret, owner, attempt) == digests.most_common(1)[0][0]


def _is_key(public: bytes, owner: str, attempt: Attempt, secret: bytes) -> bool:
    return public_bytes(mask_key_of(secret, owner, attempt)) == public
