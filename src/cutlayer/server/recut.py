"""Saved runs with another cut: forked, and one of the two deleted once the owner has decided.

It touches no run in memory (`run_table`) and trains nothing. A fork is a new run; what it was made
from stays as it was until the owner opens the fork, and a fork that is never opened goes when the
owner opens the old run again. So a crash anywhere leaves one whole run of each cut at most.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from cutlayer.errors import PermissionRefused, ProtocolError, SpecMismatch, StepExpired
from cutlayer.model.adapters import AdapterSettings, layout_of
from cutlayer.model.cut import Cut
from cutlayer.model.moved_blocks import block_of, check_moved, moments_of, of_blocks
from cutlayer.model.partition import Trunk
from cutlayer.model.tensor_file import read_tensors
from cutlayer.server.owner_vaults import vault_of
from cutlayer.server.run_files import MAX_NAME_LENGTH, cut_of, run_folder, step_files
from cutlayer.settings import parse_settings
from cutlayer.storage.files import explain_os_errors, remove_leftovers, sync_folder
from cutlayer.storage.steps import StepStore
from cutlayer.storage.vault import Vault
from cutlayer.wire.recut_messages import Recut, fork_id, parent_id

__all__ = ["Forks", "Moved"]


@dataclass(frozen=True, kw_only=True)
class Moved:
    """Weights and moments of blocks that change sides, by their keys."""

    weights: Mapping[str, Tensor]
    moments: Mapping[str, Tensor]


class Forks:
    """Forks of the saved runs of one state folder."""

    def __init__(
        self, trunk: Trunk, state_folder: Path, vault: Vault, max_stored_runs: int
    ) -> None:
        """Args:
        trunk: its blocks are what a new cut may use.
        state_folder: where owners' runs are saved.
        vault: seals what is saved.
        max_stored_runs: of one owner, forks not counted.
        """
        self._trunk = trunk
        self._whole = Cut(trunk.block_range.start, trunk.block_range.stop)
        self._folder = state_folder
        self._vault = vault
        self._max_stored_runs = max_stored_runs

    def fork(self, owner: str, call: Recut, came: Moved, may_leave: Callable[[], None]) -> Moved:
        """Save a step of a run as the first one of a run with another cut.

        Args:
            owner: the client's name.
            call: which step, and where to cut.
            came: what the client sent of blocks that come here.
            may_leave: asked before weights leave; raises PermissionRefused.

        Returns:
            What the client gets of blocks that go to it.

        Raises:
            SpecMismatch: the trunk here does not have all blocks of the new cut.
            StepExpired: the run or its step is not saved here.
            ProtocolError: a name that is not the run's next one, or tensors that do not fit.
            PermissionRefused: no room for another run, or private weights would leave.
        """
        new = self._new_cut(call)
        files = self._load(owner, call.run_id, call.step)
        about = json.loads(files["state.json"])
        old = cut_of(about) or self._whole
        weights = read_tensors(files, "adapter.safetensors")
        moments = read_tensors(files, "optimizer.safetensors")
        gone = of_blocks(weights, set(old.trunk) - set(new.trunk))
        if gone:
            may_leave()
        kept = of_blocks(weights, set(old.trunk) & set(new.trunk))
        check_moved(came.weights, came.moments, self._arriving(about, old, new), "client")
        state = Moved(
            weights={**kept, **came.weights},
            moments={**moments_of(moments, kept), **came.moments},
        )
        self._save(owner, call, about, state)
        return Moved(weights=gone, moments=moments_of(moments, gone))

    def settle(self, owner: str, run_id: str) -> str | None:
        """The owner uses this run: forget its fork, or the run that it was forked from.

        Returns:
            The run that it was forked from, where that was deleted just now.
        """
        _finish_deletions(run_folder(self._folder, owner, run_id).parent)
        if len(fork_id(run_id)) <= MAX_NAME_LENGTH:
            self._forget_fork(owner, run_id)
        return self.forget_parent(owner, run_id)

    def forget_parent(self, owner: str, run_id: str) -> str | None:
        """The owner has become this run, as it opens or forks it: what that was made from goes.

        Returns:
            As `settle`.
        """
        parent = parent_id(run_id)
        if parent is None:
            return None
        folder = run_folder(self._folder, owner, parent)
        if not folder.is_dir() or self._about(owner, run_id).get("forked_from") != parent:
            return None
        _delete(folder)
        return parent

    def _forget_fork(self, owner: str, run_id: str) -> None:
        fork = run_folder(self._folder, owner, fork_id(run_id))
        about = self._about(owner, fork.name) if fork.is_dir() else {"forked_from": None}
        # One that has no step at all was broken off by a full disk.
        if not about or about.get("forked_from") == run_id:
            _delete(fork)

    def _new_cut(self, call: Recut) -> Cut:
        new, whole = Cut(call.lower, call.upper), self._whole
        if not new.is_within(whole):
            raise SpecMismatch(
                f"a re-cut to {new.lower}:{new.upper} needs blocks that this server does not have; "
                f"it serves cuts within {whole.lower}:{whole.upper}"
            )
        if call.new_run_id != fork_id(call.run_id):
            raise ProtocolError(f"the fork of run {call.run_id} is called {fork_id(call.run_id)}")
        return new

    def _load(self, owner: str, run_id: str, step: int) -> dict[str, bytes]:
        folder = run_folder(self._folder, owner, run_id)
        store = StepStore(folder, vault_of(self._vault, owner)) if folder.is_dir() else None
        if store is None or step not in store.steps():
            raise StepExpired(
                f"the server has no step {step} of run {run_id} of {owner}; `cutlayer train` goes "
                "back to a step that both sides have, and then it can be re-cut"
            )
        return store.load(step)

    def _arriving(self, about: Mapping[str, object], old: Cut, new: Cut) -> dict[str, list[int]]:
        """Key -> shape of what the client has to send."""
        adapter = about["adapter"]
        assert isinstance(adapter, dict)
        settings = parse_settings(AdapterSettings, adapter, "the saved run")
        layout = layout_of(self._trunk, settings, new.trunk)
        return {key: shape for key, shape in layout.items() if block_of(key) not in old.trunk}

    def _save(self, owner: str, call: Recut, about: Mapping[str, object], state: Moved) -> None:
        adapter, cut = about["adapter"], Cut(call.lower, call.upper)
        assert isinstance(adapter, dict)
        store = self._fork_store(owner, call, cut)
        files = step_files(
            call.step, cut, adapter, state.weights, state.moments, forked_from=call.run_id
        )
        store.save(call.step, files, call.pin)

    def _fork_store(self, owner: str, call: Recut, cut: Cut) -> StepStore:
        """Where the fork is saved; one of another cut, which was never opened, makes room."""
        folder = run_folder(self._folder, owner, call.new_run_id)
        if folder.is_dir():
            about = self._about(owner, folder.name)
            if about and about.get("forked_from") != call.run_id:
                raise ProtocolError(f"{owner} has another run {call.new_run_id}; purge it first")
            if cut_of(about) != cut:
                _delete(folder)
        elif sum(1 for _ in folder.parent.iterdir()) > self._max_stored_runs:
            raise PermissionRefused(
                f"{owner} has {self._max_stored_runs} runs stored here, its limit, and a fork; ask "
                "the operator to delete old ones"
            )
        return StepStore(folder, vault_of(self._vault, owner))

    def _about(self, owner: str, run_id: str) -> dict[str, object]:
        """What the newest saved step of a run says of it; empty where it has none. One that was
        trained since its re-cut says nothing of that any more."""
        store = StepStore(run_folder(self._folder, owner, run_id), vault_of(self._vault, owner))
        steps = store.steps()
        if not steps:
            return {}
        about = json.loads(store.load(steps[-1])["state.json"])
        assert isinstance(about, dict)
        return about


def _delete(folder: Path) -> None:
    """Away at once: what a crash leaves of it is no run."""
    _finish_deletions(folder.parent)
    with explain_os_errors(f"remove {folder}"):
        folder.rename(folder.with_name(f".{folder.name}.cutlayer-tmp"))
        sync_folder(folder.parent)
    _finish_deletions(folder.parent)


def _finish_deletions(runs: Path) -> None:
    """Of an owner's folder: what an earlier process was killed in the middle of."""
    if runs.is_dir():
        remove_leftovers(runs)
