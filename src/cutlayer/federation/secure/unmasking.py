"""UNMASK: what a member reveals in the end, and how the server reads it.

It does not check who survived (`member`) nor what the secrets open (`recovery`).

A member's entries are sealed under its `unlock` secret, whose shares its neighbours reveal only if
they were told that the member survived. So what a member reveals is readable only if a threshold of
its neighbours was told so. It stands in for the signatures of inclusion in Bell et al. (CCS 2020),
algorithm 3, and needs no call of its own. Without it a server that lies could tell all neighbours
of A's neighbours that those dropped, tell A's neighbours that A did not, and read A's update.
"""

from collections.abc import Mapping

from cutlayer.federation.secure.attempt import Attempt
from cutlayer.federation.secure.masks import SECRET_BYTES
from cutlayer.federation.secure.shares import Bundle, open_envelope, seal_envelope, unlock_key
from cutlayer.wire.federation_messages import Unmask, UpdateTaken

__all__ = ["is_opened_by", "read_key_share", "read_seed_share", "reveal", "unlock_share"]


def reveal(
    name: str,
    attempt: Attempt,
    unlock: bytes,
    bundles: Mapping[str, Bundle],
    taken: UpdateTaken,
) -> Unmask:
    """Shares of survivors' seeds and of dropped members' keys, sealed until enough agree.

    Args:
        name: who reveals.
        attempt: what it belongs to.
        unlock: the member's own secret.
        bundles: shares it holds, by owner, its own included.
        taken: survivors and dropped, checked already.
    """
    seeds, keys = {}, {}
    for owner in (*taken.survivors, name):
        bundle, binding = bundles[owner], attempt.binding("seed share", name, owner)
        sealed = seal_envelope(
            unlock_key(unlock, binding), bundle.seed + bundle.seed_digest, binding
        )
        seeds[owner] = bundle.unlock + sealed
    for owner in taken.dropped:
        binding = attempt.binding("key share", name, owner)
        keys[owner] = seal_envelope(unlock_key(unlock, binding), bundles[owner].key, binding)
    return Unmask(
        federation=attempt.federation,
        round=attempt.round,
        attempt=attempt.attempt,
        seed_shares=seeds,
        key_shares=keys,
    )


def unlock_share(answer: Unmask, owner: str) -> bytes:
    """The share of `owner`'s unlock secret in a neighbour's answer."""
    return answer.seed_shares[owner][:SECRET_BYTES]


def is_opened_by(unlock: bytes, name: str, answer: Unmask, attempt: Attempt) -> bool:
    """Whether `unlock` is the secret of the member that gave `answer`."""
    return read_seed_share(unlock, name, answer, name, attempt) is not None


def read_seed_share(
    unlock: bytes, name: str, answer: Unmask, owner: str, attempt: Attempt
) -> tuple[bytes, bytes] | None:
    """Share of a survivor's seed and the seed's digest; None if `unlock` does not open it."""
    binding = attempt.binding("seed share", name, owner)
    sealed = answer.seed_shares[owner][SECRET_BYTES:]
    data = open_envelope(unlock_key(unlock, binding), sealed, binding)
    return None if data is None else (data[:SECRET_BYTES], data[SECRET_BYTES:])


def read_key_share(
    unlock: bytes, name: str, answer: Unmask, owner: str, attempt: Attempt
) -> bytes | None:
    """Share of a dropped member's mask key; None if `unlock` does not open it."""
    binding = attempt.binding("key share", name, owner)
    return open_envelope(unlock_key(unlock, binding), answer.key_shares[owner], binding)
