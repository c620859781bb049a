"""The trunk's side of rounds where the trunk is in this process: the host, on the runner's thread.

It does not know replicas (`replica_pool`).
"""

from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

from cutlayer.federation.trunk_pool import TrunkUpdate, UpdateKind
from cutlayer.model.adapters import AdapterSettings, AdapterState
from cutlayer.server.host import TrunkHost
from cutlayer.server.runner import Runner

__all__ = ["LocalPool"]

T = TypeVar("T")
_NOBODY = ""
"""The scheduler's name for work that is no client's."""


class LocalPool:
    """Implements `federation.trunk_pool.TrunkPool`; each call waits for the runner."""

    def __init__(self, host: TrunkHost, runner: Runner) -> None:
        """
        Args:
            host: where members' runs are.
            runner: the thread that may call it.
        """
        self._host, self._runner = host, runner

    def layout(self, adapter: AdapterSettings) -> Mapping[str, Sequence[int]]:
        """See `TrunkPool`."""
        return self._do(lambda: self._host.adapter_layout(adapter))

    def begin_round(
        self, run_id: str, adapter: AdapterSettings, states: Mapping[str, AdapterState]
    ) -> None:
        """See `TrunkPool`."""
        self._do(lambda: self._host.begin_round(run_id, adapter, states))

    def collect(
        self, run_id: str, members: Sequence[str], kind: UpdateKind
    ) -> Mapping[str, TrunkUpdate]:
        """See `TrunkPool`."""
        return self._do(lambda: self._host.collect(run_id, members, kind))

    def end_round(self, run_id: str) -> None:
        """See `TrunkPool`."""
        self._do(lambda: self._host.end_round(run_id))

    def _do(self, work: Callable[[], T]) -> T:
        return self._runner.submit(_NOBODY, 0, work).result()
