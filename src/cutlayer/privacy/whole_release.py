"""One ledger line for tensors that leave as a whole, by their content: adapters, updates, numbers.

Vectors of rows are accounted apart (`boundary`). It decides nothing: gates do.
"""

import hashlib
from collections.abc import Mapping

from cutlayer.errors import ConfigError
from cutlayer.privacy.boundary import BoundaryName, is_identifier
from cutlayer.privacy.ledger import Ledger, Release
from cutlayer.privacy.mechanism import PrivacyEvent
from cutlayer.wire.codec import Packed

__all__ = ["account_whole", "digest_of"]


def account_whole(
    ledger: Ledger, boundary: BoundaryName, mechanism: str, name: str, content: str
) -> None:
    """Write the line before anything leaves; the same content under the same name is a replay.

    Args:
        ledger: the run's ledger.
        boundary: where it leaves.
        mechanism: of the event.
        name: identifier of a round or a step. Whoever sets one back uses it twice; other content
            under it is no replay.
        content: tells two contents apart.

    Raises:
        ConfigError: the name is no identifier.
        BudgetExceeded: an account over all runs forbids it.
    """
    if not is_identifier(name):
        raise ConfigError(f"{boundary}: {name!r:.80} is no identifier of a round or a step")
    key = hashlib.sha256(f"{boundary}|{name}|{content}".encode()).hexdigest()[:32]
    event = PrivacyEvent(mechanism=mechanism, scale=None, num_vectors=1)
    ledger.account(boundary, event, name, [Release(key=key, num_vectors=1)])


def digest_of(tensors: Mapping[str, Packed]) -> str:
    """SHA-256, hex, of names and bytes."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode())
        for buffer in tensors[name].buffers:
            digest.update(buffer)
    return digest.hexdigest()
