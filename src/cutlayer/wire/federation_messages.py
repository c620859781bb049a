"""The headers of a federation's rounds; the spec is docs/wire.md.

It does not decide anything (`federation.coordinator`, `client.member`). No header has a place for
a token, a label or a text; a loss travels only in PUBLISH, which an owner has to ask for.

Every call names its round and attempt. It may be repeated: the answer is then the same.
"""

from typing import ClassVar

import msgspec

from cutlayer.wire.header import Header

__all__ = [
    "Adopt",
    "Adopted",
    "EnterRound",
    "Join",
    "Joined",
    "Leave",
    "Left",
    "PeerKey",
    "PeerKeys",
    "PeerSecrets",
    "Publish",
    "Published",
    "Round",
    "SendUpdate",
    "ShareKeys",
    "ShareSecrets",
    "Unmask",
    "Unmasked",
    "UpdateTaken",
    "Wait",
    "round_run_id",
]


class Join(Header, frozen=True, kw_only=True):
    """Become a member under the certificate's name; a repeated JOIN changes nothing."""

    federation: str
    fingerprint: dict[str, str]
    """What all members must have in common, by name: adapter, tokenizer, cut, model."""
    layout: dict[str, list[int]]
    """Key and shape of every adapter tensor of head and tail, sorted by key."""


class Joined(Header, frozen=True, kw_only=True):
    """The rules of the federation and where it stands."""

    policy: str
    """JSON of `federation.settings.FederationPolicy`."""
    round: int
    """The last finished round; 0 before the first."""
    digest: str
    """End of the chain of rounds, hex."""
    member: str = ""
    """Under which name the member is known: its certificate's."""


class EnterRound(Header, frozen=True, kw_only=True):
    """Ask for the next round; the answer comes when the member is in a cohort, or at the end."""

    federation: str
    round: int
    """The last round whose result the member has; 0 for none."""
    digest: str
    """The chain's end as the member knows it; empty for none."""
    needs_state: bool
    """The member has no adapters of that round: it is new, or lost them."""


class Round(Header, frozen=True, kw_only=True):
    """A round begins, or the federation has ended.

    Tensors: the head's and tail's global adapters, with mixed cuts the trunk's too. If the
    aggregate is hidden from the server: `sum`, the padded sum of the round before, and for whoever
    lacks the state before it `sealed`, that state encrypted under the group's key; both in ring64.
    """

    num_late: ClassVar[int] = 1

    round: int
    """The round to train; after the end, the last finished one plus one."""
    attempt: int
    """How often this round has been begun, from 1."""
    is_finished: bool
    """No round follows; the tensors are the result."""
    cohort: list[str]
    """Who is asked, sorted."""
    digest: str
    """The chain's end: that of round `round - 1`."""
    payload_digest: str
    """SHA-256 of the tensors as they are; the chain's newest link is made of it."""
    survivors: list[str]
    """Members whose updates are in the round before; a hidden sum is unpadded with these."""
    total_weight: int
    """Sum of their weights; 0 where the server does not know it."""
    sum_attempt: int = 0
    """Hidden aggregate: the attempt of the round before that made `sum`; pads are bound to it."""
    cuts: dict[str, list[int]] = msgspec.field(default_factory=dict)
    """Mixed cuts: lower and upper of everybody in the cohort, by name; else absent on the wire."""


class ShareKeys(Header, frozen=True, kw_only=True):
    """Secure aggregation 1: fresh public keys of this member for this attempt."""

    federation: str
    round: int
    attempt: int
    cipher_key: bytes
    """X25519 public key for encrypting shares between members."""
    mask_key: bytes
    """X25519 public key for pairwise masks."""
    certificate: bytes
    """DER; empty only where the link is plaintext on loopback."""
    signature: bytes
    """By the certificate's key over federation, round, attempt, name and both keys."""


class PeerKey(
    msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, array_like=True
):
    """Public keys of one neighbour, as that member sent them."""

    member: str
    cipher_key: bytes
    mask_key: bytes
    certificate: bytes
    signature: bytes


class PeerKeys(Header, frozen=True, kw_only=True):
    """Keys of the member's neighbours in the graph, and how many shares open a secret."""

    peers: list[PeerKey]
    threshold: int


class ShareSecrets(Header, frozen=True, kw_only=True):
    """Secure aggregation 2: shares of the member's secrets, encrypted for each neighbour."""

    federation: str
    round: int
    attempt: int
    sealed: dict[str, bytes]


class PeerSecrets(Header, frozen=True, kw_only=True):
    """Shares that neighbours encrypted for this member."""

    sealed: dict[str, bytes]


class SendUpdate(Header, frozen=True, kw_only=True):
    """What the member learnt. Tensors: `masked` in ring64, or the update's own (raw) if plain.

    With a hidden aggregate also `sealed`, in ring64: the state that the member began with,
    encrypted under the group's key.
    """

    federation: str
    round: int
    attempt: int
    weight: int
    """Scored tokens; 0 under secure aggregation, where it is inside the masked vector."""


class UpdateTaken(Header, frozen=True, kw_only=True):
    """The round's updates are in."""

    survivors: list[str]
    """The member's neighbours whose updates came; UNMASK opens their seeds."""
    dropped: list[str]
    """Neighbours whose updates did not come; UNMASK opens their mask keys."""
    is_secure: bool
    """Whether UNMASK is to follow."""


class Unmask(Header, frozen=True, kw_only=True):
    """Secure aggregation 3: shares of neighbours' secrets, never both kinds of one neighbour."""

    federation: str
    round: int
    attempt: int
    seed_shares: dict[str, bytes]
    """Of survivors: what opens their own masks."""
    key_shares: dict[str, bytes]
    """Of the dropped: what opens their pairwise masks."""


class Unmasked(Header, frozen=True, kw_only=True):
    """Taken."""


class Leave(Header, frozen=True, kw_only=True):
    """Leave the federation; the member may join again later."""

    federation: str


class Left(Header, frozen=True, kw_only=True):
    """Done."""


class Publish(Header, frozen=True, kw_only=True):
    """Numbers that the owner chose to show on the federation's page."""

    federation: str
    round: int
    metrics: dict[str, float]


class Published(Header, frozen=True, kw_only=True):
    """Kept."""


class Adopt(Header, frozen=True, kw_only=True):
    """Keep the trunk's adapter of the last finished round as a saved step of one's own run."""

    federation: str
    round: int
    run_id: str
    """The member's own run, from which it then generates and exports."""


class Adopted(Header, frozen=True, kw_only=True):
    """The run has a saved step of this number, which is the round's."""

    step: int


class Wait(Header, frozen=True, kw_only=True):
    """No answer yet: send the same call again."""


def round_run_id(federation: str, round_number: int, attempt: int) -> str:
    """Name of every member's trunk run within one attempt of a round."""
    return f"{federation}.r{round_number}.a{attempt}"
