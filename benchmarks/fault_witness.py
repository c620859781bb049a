"""Stands beside the product's own objects in this process and writes down what they did.

`witnesses` replaces three names by subclasses that note and then do the same: a member's handover
(its update before it is masked), the trunk's pool (what each survivor's trunk learnt), and the
coordinator's store (which can also be stopped dead between two writes). It changes nothing else and
judges nothing.
"""

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from torch import Tensor

import cutlayer.client.member
import cutlayer.server.federation
import cutlayer.server.server
from benchmarks.fault_evidence import Name, Sent
from cutlayer.client.handing_in import Handover, Learnt
from cutlayer.errors import StorageError
from cutlayer.federation.checkpoints import Checkpoint
from cutlayer.federation.store import FederationStore
from cutlayer.federation.store_rows import Pinned, RoundRow
from cutlayer.federation.trunk_pool import TrunkUpdate, UpdateKind
from cutlayer.privacy.update_gate import UpdateGate
from cutlayer.server.local_pool import LocalPool
from cutlayer.storage.vault import Vault

__all__ = ["Notes", "notes_of", "witnesses"]


class Notes:
    """What was seen of one federation."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.sent: dict[Name, list[Sent]] = {}
        self.trunk: dict[str, list[Mapping[str, TrunkUpdate]]] = {}
        self.on_commit: Callable[[str, int], None] = lambda stage, round_number: None
        """Called by the coordinator's thread at each of `fault_plan.COMMIT_STAGES`."""

    def note_sent(self, name: Name, sent: Sent) -> None:
        """A member is about to hand in an update."""
        with self._lock:
            self.sent.setdefault(name, []).append(sent)

    def note_trunk(self, run_id: str, updates: Mapping[str, TrunkUpdate]) -> None:
        """The coordinator has collected the trunk's updates."""
        copies = {
            member: TrunkUpdate(
                state={key: x.clone() for key, x in update.state.items()}, weight=update.weight
            )
            for member, update in updates.items()
        }
        with self._lock:
            self.trunk.setdefault(run_id, []).append(copies)


_NOTES: dict[str, Notes] = {}


def notes_of(federation: str) -> Notes:
    """The notes on the federation of that name."""
    return _NOTES.setdefault(federation, Notes())


@contextmanager
def witnesses() -> Iterator[None]:
    """Take their places in this process until the block ends."""
    places = (
        (cutlayer.client.member, "Handover", WitnessedHandover),
        (cutlayer.server.server, "LocalPool", WitnessedPool),
        (cutlayer.server.federation, "FederationStore", MortalStore),
    )
    before = [(module, name, getattr(module, name)) for module, name, _ in places]
    try:
        for module, name, witness in places:
            setattr(module, name, witness)
        yield
    finally:
        for module, name, own in before:
            setattr(module, name, own)


class WitnessedHandover(Handover):
    """Notes the update as it is before masks."""

    def send(self, learnt: Learnt, gate: UpdateGate, start: Mapping[str, Tensor]) -> None:
        """See `Handover`."""
        begun = self._begun
        name = (self._credentials.name, begun.round, begun.attempt)
        copies = {key: x.detach().clone() for key, x in learnt.update.items()}
        notes_of(self._policy.name).note_sent(name, Sent(update=copies, weight=learnt.weight))
        super().send(learnt, gate, start)


class WitnessedPool(LocalPool):
    """Notes what was collected."""

    def collect(
        self, run_id: str, members: Sequence[str], kind: UpdateKind
    ) -> Mapping[str, TrunkUpdate]:
        """See `LocalPool`."""
        updates = super().collect(run_id, members, kind)
        notes_of(run_id.split(".")[0]).note_trunk(run_id, updates)
        return updates


class MortalStore(FederationStore):
    """A store whose process can be stopped dead between two of its writes."""

    def __init__(self, folder: Path, federation: str, vault: Vault | None = None) -> None:
        self.lock = threading.RLock()
        self.is_dead = False
        super().__init__(folder, federation, vault)
        self._notes = notes_of(federation)
        self._save_files = self._checkpoints.save
        self._checkpoints.save = self._save_and_tell  # type: ignore[method-assign]

    def pin(self, pinned: Pinned) -> None:
        """See `FederationStore`."""
        with self._alive():
            super().pin(pinned)

    def add_member(self, name: str) -> None:
        """See `FederationStore`."""
        with self._alive():
            super().add_member(name)

    def begin_attempt(self, round_number: int, number: int, cohort: Sequence[str]) -> None:
        """See `FederationStore`."""
        with self._alive():
            super().begin_attempt(round_number, number, cohort)

    def fail_attempt(self, round_number: int, number: int, reason: str) -> None:
        """See `FederationStore`."""
        with self._alive():
            super().fail_attempt(round_number, number, reason)

    def commit_round(
        self, row: RoundRow, checkpoint: Checkpoint, outcome: str = "finished"
    ) -> None:
        """See `FederationStore`."""
        with self._alive():
            self._notes.on_commit("before files", row.number)
            self._refuse_dead()
            super().commit_round(row, checkpoint, outcome)
            self._notes.on_commit("after row", row.number)
            self._refuse_dead()

    def _save_and_tell(
        self, step: int, files: Mapping[str, bytes], is_pinned: bool = False
    ) -> None:
        self._save_files(step, files, is_pinned)
        self._notes.on_commit("before row", step)
        self._refuse_dead()

    @contextmanager
    def _alive(self) -> Iterator[None]:
        with self.lock:
            self._refuse_dead()
            yield

    def _refuse_dead(self) -> None:
        if self.is_dead:
            raise StorageError("this server was killed")
