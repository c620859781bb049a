"""Checks of what several hops return, as one: each hop's replies are checked on the way.

It checks nothing itself (`returned`).
"""

from collections.abc import Sequence

from torch import Tensor

from cutlayer.client.returned import ReturnChecks, TrainingCall
from cutlayer.client.run_state import StepRecord
from cutlayer.client.settings import CheckSettings
from cutlayer.model.adapters import AdapterState
from cutlayer.model.rows import Rows
from cutlayer.wire.packed import Packed

__all__ = ["ChainChecks"]


class ChainChecks(ReturnChecks):
    """One hop that misbehaves ends all sending."""

    def __init__(self, hops: Sequence[ReturnChecks]) -> None:
        """
        Args:
            hops: the checks of each, the lowest first.
        """
        super().__init__(CheckSettings(profile=False))
        self._hops = tuple(hops)
        self.declared: Sequence[AdapterState] = ()
        """Adapters that the hops declared last."""

    def require_trust(self) -> None:
        """See `ReturnChecks`."""
        for hop in self._hops:
            hop.require_trust()

    def begin_step(self, step: int, batches: Sequence[Rows]) -> None:
        """See `ReturnChecks`; each hop draws for itself."""
        for hop in self._hops:
            hop.begin_step(step, batches)

    def evaluation(self, step: int, sent: Packed, y_ND: Tensor) -> None:
        """Nothing: it was done on the way."""

    def forward(self, call: TrainingCall, y_ND: Tensor) -> None:
        """Nothing: it was done on the way."""

    def backward(self, call: TrainingCall, gradient_ND: Tensor) -> None:
        """Nothing: it was done on the way."""

    @property
    def wants_step(self) -> bool:
        """See `ReturnChecks`."""
        return any(hop.wants_step for hop in self._hops)

    @property
    def wants_adapter(self) -> bool:
        """See `ReturnChecks`."""
        return any(hop.wants_adapter for hop in self._hops)

    def compare_step(self, declared: AdapterState | None, history: Sequence[StepRecord]) -> None:
        """See `ReturnChecks`; each hop declares its own adapter."""
        for number, hop in enumerate(self._hops):
            if hop.wants_step:
                own = self.declared[number] if hop.wants_adapter else None
                hop.compare_step(own, history)
        self.num_spot_checks = sum(hop.num_spot_checks for hop in self._hops)
