"""What two sides say to each other to prove what they run; the spec is docs/wire.md.

It knows bytes only: evidence, policies and keys are the business of `tee`. No frame of these kinds
carries a tensor.
"""

from cutlayer.wire.header import Header

__all__ = ["Challenge", "Key", "KeyRequest", "Proof"]


class Challenge(Header, frozen=True, kw_only=True):
    """Up: prove what you run, now; answered by EVIDENCE. Down: your evidence is accepted."""

    nonce: str
    """32 random bytes in hex. Up: what the evidence must bind. Down: what the client's next one
    must; a nonce is used once."""


class Proof(Header, frozen=True, kw_only=True):
    """EVIDENCE. Down: answers CHALLENGE. Up: the client's own, answered by CHALLENGE."""

    proof: bytes
    """Evidence and the public key that it vouches for, packed by `tee.challenge`."""


class KeyRequest(Header, frozen=True, kw_only=True):
    """Up: a key that the server releases to attested clients; answered by KEY."""

    name: str


class Key(Header, frozen=True, kw_only=True):
    """Down: answers KEY_REQUEST. Up: a key for the server, answered by KEY with nothing in it."""

    sealed: bytes
    """To the public key of the receiver's evidence, by `tee.key_release`."""
