"""The gate of a federation: adapter updates, and numbers that the owner chose to publish.

Vectors of rows leave elsewhere (`boundary`). It aggregates nothing and does not send.
"""

from collections.abc import Mapping
from dataclasses import InitVar, dataclass, field

from torch import Tensor

from cutlayer.errors import ConfigError
from cutlayer.privacy.boundary import BoundaryName
from cutlayer.privacy.ledger import Ledger
from cutlayer.privacy.whole_release import account_whole, digest_of
from cutlayer.wire.codec import Packed, get_codec
from cutlayer.wire.ring import pack_ring, words_of

__all__ = ["ReleasedUpdate", "UpdateGate"]


class _Gate:
    """Whoever holds the one instance may make a ReleasedUpdate."""


_GATE = _Gate()


@dataclass(frozen=True, kw_only=True)
class ReleasedUpdate:
    """Tensors of an update that may go to the federation. Only this module makes one."""

    tensors: Mapping[str, Packed] = field(repr=False)
    gate: InitVar[_Gate]

    def __post_init__(self, gate: _Gate) -> None:
        if gate is not _GATE:
            raise TypeError("only UpdateGate makes a ReleasedUpdate")


class UpdateGate:
    """The gate of a federation: adapter updates, and numbers that the owner publishes."""

    def __init__(self, ledger: Ledger, allows_plain: bool, publishes: bool) -> None:
        """
        Args:
            ledger: the run's ledger.
            allows_plain: the owner accepts that the server sees its update by itself.
            publishes: the owner shows its losses to the federation.
        """
        self._ledger = ledger
        self._allows_plain = allows_plain
        self._publishes = publishes

    def masked(self, masked_M: Tensor, name: str, sealed: bytes | None = None) -> ReleasedUpdate:
        """An update under secure aggregation: int64 ring elements, uniform to whoever sees them.

        Args:
            masked_M: values and weight, masked.
            name: identifier of federation, round and attempt.
            sealed: adapters encrypted under the members' key, for newcomers.
        """
        tensors = {"masked": pack_ring(masked_M)}
        if sealed is not None:
            tensors["sealed"] = pack_ring(words_of(sealed))
        account_whole(self._ledger, BoundaryName.UPDATES, "masked_sum", name, digest_of(tensors))
        return ReleasedUpdate(tensors=tensors, gate=_GATE)

    def plain(self, update: Mapping[str, Tensor], name: str) -> ReleasedUpdate:
        """An update that the server sees by itself.

        Raises:
            ConfigError: the owner has not accepted that.
        """
        self.require_plain_accepted()
        raw = get_codec("raw")
        tensors = {key: raw.encode(x) for key, x in update.items()}
        account_whole(self._ledger, BoundaryName.UPDATES, "none", name, digest_of(tensors))
        return ReleasedUpdate(tensors=tensors, gate=_GATE)

    def require_plain_accepted(self) -> None:
        """Refuse before any work what `plain` would refuse after it.

        Raises:
            ConfigError: the owner has not accepted that the server sees its updates.
        """
        if not self._allows_plain:
            raise ConfigError(
                "this federation aggregates without secure aggregation: the server would see your "
                "adapter update, from which text can be rebuilt; ask its operator for "
                "secure.enabled=true, or accept it with federation.share_plain_updates=true"
            )

    def metrics(self, values: Mapping[str, float], name: str) -> dict[str, float] | None:
        """What of these numbers may be shown; None where the owner shows none."""
        if not self._publishes:
            return None
        account_whole(
            self._ledger, BoundaryName.METRICS, "none", name, repr(sorted(values.items()))
        )
        return dict(values)
