"""Which training runs are in memory, the owners' own and the rounds': opened, found, unloaded.

It does not compute (`runs`) nor choose members. An owner's own run lives in its store; a round's
run lives in memory alone, and its results leave through `collect`.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from cutlayer.errors import PermissionRefused, StepExpired
from cutlayer.federation.trunk_pool import TrunkUpdate, UpdateKind
from cutlayer.model.adapters import AdapterSettings, AdapterState, attach, layout_of
from cutlayer.model.cut import Cut
from cutlayer.model.partition import Trunk
from cutlayer.server.adapter_limits import check_adapter
from cutlayer.server.owner_vaults import vault_of
from cutlayer.server.recut import Forks, Moved
from cutlayer.server.rounds import RoundTable, TrainedBlocks
from cutlayer.server.run_files import run_folder
from cutlayer.server.runs import TrainingRun
from cutlayer.server.settings import LimitSettings
from cutlayer.settings import parse_settings
from cutlayer.storage.steps import StepStore
from cutlayer.storage.vault import Vault
from cutlayer.wire.messages import OpenRun
from cutlayer.wire.recut_messages import Recut

__all__ = ["RunTable"]

Key = tuple[str, str]
"""Owner and run id."""


class RunTable:
    """Runs by owner and run id.

    Attributes:
        runs: those in memory.
    """

    def __init__(
        self,
        trunk: Trunk,
        limits: LimitSettings,
        state_folder: Path,
        vault: Vault,
        new_name: Callable[[], str],
        clock: Callable[[], float],
    ) -> None:
        """Args:
        trunk: what the runs train.
        limits: what one owner gets.
        state_folder: where owners' runs are saved.
        vault: seals what is saved.
        new_name: gives each adapter its own name.
        clock: seconds, for idle times.
        """
        self.runs: dict[Key, TrainingRun] = {}
        self._last_used_s: dict[Key, float] = {}
        self._trunk = trunk
        self._limits = limits
        self._folder = state_folder
        self._vault = vault
        self._new_name = new_name
        self._clock = clock
        self._rounds = RoundTable(trunk, new_name)
        self._forks = Forks(trunk, state_folder, vault, limits.max_client_stored_runs)

    def open(self, owner: str, opened: OpenRun, cut: Cut) -> TrainingRun:
        """Load or create a run; an open one of this name begins anew.

        Args:
            owner: the client's name.
            opened: what it said.
            cut: where its rows enter and leave the trunk.

        Raises:
            StepExpired: no step in common, or no such round.
            ConfigError: settings that the server or the round does not allow.
        """
        key = (owner, opened.run_id)
        self._close(key)
        self._make_room(owner)
        settings = parse_settings(AdapterSettings, opened.adapter, "the run's adapter settings")
        check_adapter(settings, self._limits)
        is_in_round = opened.federation is not None
        opening = self._open_in_round if is_in_round else self._open_own
        self.runs[key] = opening(owner, opened, settings, cut)
        self._last_used_s[key] = self._clock()
        return self.runs[key]

    def get(self, owner: str, run_id: str) -> TrainingRun:
        """An open run.

        Raises:
            StepExpired: it is not open.
        """
        run = self.runs.get((owner, run_id))
        if run is None:
            raise StepExpired(f"run {run_id} is not open here; open it again")
        self._last_used_s[owner, run_id] = self._clock()
        return run

    def store(self, owner: str, run_id: str) -> StepStore:
        """Saved steps of an owner's own run.

        Raises:
            StepExpired: it has none here.
        """
        folder = run_folder(self._folder, owner, run_id)
        if not folder.is_dir():
            raise StepExpired(f"the server has no run {run_id} of {owner}; train it first")
        self._close((owner, self._forks.settle(owner, run_id) or ""))
        return StepStore(folder, vault_of(self._vault, owner))

    def fork(self, owner: str, call: Recut, came: Moved, may_leave: Callable[[], None]) -> Moved:
        """As `recut.Forks.fork`; that a run is forked tells too that its owner has become it."""
        self._close((owner, self._forks.forget_parent(owner, call.run_id) or ""))
        return self._forks.fork(owner, call, came, may_leave)

    def layout(self, adapter: AdapterSettings) -> Mapping[str, list[int]]:
        """As `federation.trunk_pool.TrunkPool.layout`."""
        check_adapter(adapter, self._limits)
        return layout_of(self._trunk, adapter)

    def begin_round(
        self, run_id: str, adapter: AdapterSettings, states: Mapping[str, AdapterState]
    ) -> None:
        """As `federation.trunk_pool.TrunkPool.begin_round`; called again, it adds members."""
        check_adapter(adapter, self._limits)
        self._rounds.begin(run_id, adapter, states)

    def collect(
        self, run_id: str, members: Sequence[str], kind: UpdateKind
    ) -> Mapping[str, TrunkUpdate]:
        """As `federation.trunk_pool.TrunkPool.collect`."""
        runs = {member: self.runs.get((member, run_id)) for member in members}
        # A member's own run may have the round's name: what it learnt is not the round's.
        in_round = {m: run for m, run in runs.items() if run is not None and run.is_in_round}
        updates = {member: run.update(kind) for member, run in in_round.items()}
        return {member: update for member, update in updates.items() if update is not None}

    def end_round(self, run_id: str) -> None:
        """As `federation.trunk_pool.TrunkPool.end_round`."""
        self._rounds.end(run_id)
        for key in [k for k, run in self.runs.items() if k[1] == run_id and run.is_in_round]:
            self._close(key)

    def _open_own(
        self, owner: str, opened: OpenRun, settings: AdapterSettings, cut: Cut
    ) -> TrainingRun:
        adapter = attach(self._trunk, settings, self._new_name(), cut.trunk)
        try:
            store = self._new_store(owner, opened.run_id)
            run = TrainingRun(owner, adapter, opened, store, self._limits, cut)
            self._close((owner, self._forks.settle(owner, opened.run_id) or ""))
            return run
        except BaseException:
            adapter.remove()
            raise

    def _open_in_round(
        self, owner: str, opened: OpenRun, settings: AdapterSettings, cut: Cut
    ) -> TrainingRun:
        trained = TrainedBlocks(settings=settings, blocks=cut.trunk)
        adapter, earlier = self._rounds.adapter_for(owner, opened, trained, self._clock())
        if earlier is not None:
            self._close((owner, earlier))
        return TrainingRun(owner, adapter, opened, None, self._limits, cut)

    def _new_store(self, owner: str, run_id: str) -> StepStore:
        folder = run_folder(self._folder, owner, run_id)
        limit = self._limits.max_client_stored_runs
        if not folder.exists() and folder.parent.is_dir():
            num_stored = sum(1 for _ in folder.parent.iterdir())
            if num_stored >= limit:
                raise PermissionRefused(
                    f"{owner} has {num_stored} runs stored here, its limit; ask the operator to "
                    "delete old ones"
                )
        return StepStore(folder, vault_of(self._vault, owner))

    def _make_room(self, owner: str) -> None:
        """Unload idle runs, and the owner's least recently used ones beyond its limit.

        Nothing is lost: a run that comes back is loaded from its last saved step. Runs of rounds
        have no saved steps; they end with their round.
        """
        idle_before_s = self._clock() - self._limits.run_ttl_s
        by_age = sorted(self._last_used_s, key=lambda key: self._last_used_s[key])
        stored = [k for k in by_age if k in self.runs and not self.runs[k].is_in_round]
        own = [key for key in stored if key[0] == owner]
        idle = [key for key in stored if self._last_used_s[key] < idle_before_s]
        surplus = max(0, len(own) - self._limits.max_client_runs + 1)
        for key in {*idle, *own[:surplus]}:
            self._close(key)
        self._rounds.drop_idle(idle_before_s)

    def _close(self, key: Key) -> None:
        run = self.runs.pop(key, None)
        self._last_used_s.pop(key, None)
        if run is not None:
            run.close()
