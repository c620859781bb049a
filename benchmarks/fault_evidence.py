"""What a scenario of the fault campaign left behind: at the members, and in the store.

It judges nothing (`fault_judge`).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from cutlayer.federation.checkpoints import Checkpoint
from cutlayer.federation.secure.hidden import GroupKey
from cutlayer.federation.settings import FederationSettings
from cutlayer.federation.store import FederationStore
from cutlayer.federation.store_rows import AttemptRow, MemberRow, RoundRow
from cutlayer.federation.trunk_pool import TrunkUpdate
from cutlayer.model.adapters import AdapterState
from cutlayer.model.tensor_file import read_tensors
from cutlayer.storage.steps import StepStore

__all__ = [
    "Ending",
    "Evidence",
    "Sent",
    "StoreSeen",
    "read_ends",
    "read_store",
    "saved_ends",
]

Name = tuple[str, int, int]
"""Member, round and attempt."""


@dataclass(frozen=True, kw_only=True)
class Sent:
    """An update as its member had it, before masks and weights."""

    update: AdapterState
    weight: int


@dataclass(frozen=True, kw_only=True)
class Ending:
    """How a member ended."""

    outcome: str
    """`finished`, `refused` (one of our errors), `gone` (killed for good), `broke` (any other
    exception) or `hung`."""
    error: str = ""
    message: str = ""
    ends: AdapterState | None = None
    """Head and tail, of who finished."""
    state_equals_saved: bool = True
    """What the process held is what it had saved."""


@dataclass(frozen=True, kw_only=True)
class StoreSeen:
    """The coordinator's store when all was over."""

    rounds: Sequence[RoundRow]
    attempts: Sequence[AttemptRow]
    members: Sequence[MemberRow]
    checkpoints: Mapping[int, Checkpoint]
    layout: Mapping[str, Sequence[int]] | None
    """Of head and tail, as the first member brought it."""


@dataclass(kw_only=True)
class Evidence:
    """Everything a verdict is made of."""

    rules: FederationSettings
    victims: frozenset[str]
    """Members that may be refused while the others finish."""
    trunk_layout: Mapping[str, Sequence[int]]
    group_key: GroupKey | None = None
    endings: dict[str, Ending] = field(default_factory=dict)
    sent: dict[Name, list[Sent]] = field(default_factory=dict)
    trunk: dict[str, list[Mapping[str, TrunkUpdate]]] = field(default_factory=dict)
    """By run: what was collected of the trunk, each time."""
    store: StoreSeen | None = None
    store_before: StoreSeen | None = None
    """Where the server came back from an older backup: its store before that."""
    happened: tuple[str, ...] = ()
    """Faults whose moment came."""

    @property
    def is_rolled_back(self) -> bool:
        """The server came back from a backup, so anybody may rightly refuse it."""
        return self.store_before is not None


def read_store(folder: Path) -> StoreSeen:
    """Look at a store that nobody writes any more."""
    reader = FederationStore.read_only(folder)
    try:
        steps = StepStore(folder / "checkpoints", None, 1 << 20)
        pinned = reader.pinned()
        return StoreSeen(
            rounds=reader.rounds(),
            attempts=reader.attempts(),
            members=reader.members(),
            checkpoints={n: Checkpoint.of_files(steps.load(n)) for n in steps.steps()},
            layout=None if pinned is None else pinned.layout,
        )
    finally:
        reader.close()


def saved_ends(run_folder: Path, done: int) -> AdapterState | None:
    """Head and tail that a member saved as the result of a round; None if it did not."""
    steps = StepStore(run_folder / "steps")
    if done not in steps.steps():
        return None
    return read_ends(steps.load(done))


def read_ends(files: Mapping[str, bytes]) -> dict[str, Tensor]:
    """Adapters of head and tail among a saved step's files."""
    found: dict[str, Tensor] = {}
    for part in ("head", "tail"):
        found |= read_tensors(dict(files), f"{part}.safetensors")
    return found
