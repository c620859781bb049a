"""No average of fewer owners than the enclave promises: the updates stay where they are.

It counts whose updates came and does not look into them; who is asked, and how many have to answer,
is `federation`'s. An answer alone brings nothing here: what was learnt is in the trunk's runs.
"""

from collections.abc import Mapping, Sequence

from cutlayer.errors import QuorumNotMet
from cutlayer.federation.aggregation import is_finite
from cutlayer.federation.trunk_pool import TrunkPool, TrunkUpdate, UpdateKind
from cutlayer.model.adapters import AdapterSettings, AdapterState

__all__ = ["PoolOfMany"]


class PoolOfMany:
    """Implements `federation.trunk_pool.TrunkPool` over another pool, and holds back too few."""

    def __init__(self, pool: TrunkPool, min_cohort: int) -> None:
        """
        Args:
            pool: has the updates.
            min_cohort: owners whose updates an average has at least.
        """
        self._pool, self._min_cohort = pool, min_cohort

    def layout(self, adapter: AdapterSettings) -> Mapping[str, Sequence[int]]:
        """See `TrunkPool`."""
        return self._pool.layout(adapter)

    def begin_round(
        self, run_id: str, adapter: AdapterSettings, states: Mapping[str, AdapterState]
    ) -> None:
        """See `TrunkPool`."""
        self._pool.begin_round(run_id, adapter, states)

    def collect(
        self, run_id: str, members: Sequence[str], kind: UpdateKind
    ) -> Mapping[str, TrunkUpdate]:
        """See `TrunkPool`.

        Raises:
            QuorumNotMet: fewer owners learnt something; the attempt is void.
        """
        found = self._pool.collect(run_id, members, kind)
        num_owners = sum(_counts(update, kind) for update in found.values())
        if num_owners < self._min_cohort:
            raise QuorumNotMet(
                f"the average would be of {num_owners} owners' updates, and this enclave makes "
                f"none of fewer than rounds.min_cohort={self._min_cohort}; it is not made"
            )
        return found

    def end_round(self, run_id: str) -> None:
        """See `TrunkPool`."""
        self._pool.end_round(run_id)


def _counts(update: TrunkUpdate, kind: UpdateKind) -> bool:
    """Whether an average would have something of it: NaN and what has no weight is left out."""
    values = update.state.values()
    if not all(is_finite(tensor) for tensor in values):
        return False
    if kind is UpdateKind.GRADIENT:
        return any(bool(tensor.any()) for tensor in values)
    return update.weight > 0
