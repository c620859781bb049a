"""The newest finished round in memory: its state, its place in the chain, and ROUND's content.

It does not decide when a round is finished (`coordinator`).
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from torch import Tensor

from cutlayer.errors import StorageError
from cutlayer.federation.chain import first_digest, next_digest, payload_digest
from cutlayer.federation.checkpoints import Checkpoint
from cutlayer.federation.cuts import Cuts, write_cuts
from cutlayer.federation.exchange import Answer
from cutlayer.federation.rules import Rules
from cutlayer.federation.settings import FederationSettings
from cutlayer.federation.state import Layout
from cutlayer.federation.store import FederationStore
from cutlayer.federation.store_rows import RoundRow
from cutlayer.model.adapters import AdapterState
from cutlayer.wire.federation_messages import EnterRound, Round
from cutlayer.wire.ring import words_of

__all__ = ["History"]


class History:
    """Read from the store at the start, then moved on by `commit`."""

    def __init__(self, settings: FederationSettings, store: FederationStore, trunk: Layout) -> None:
        """Read the last finished round.

        Raises:
            StorageError: it was made with other settings, or its files are damaged.
        """
        self._settings, self._store, self._trunk = settings, store, trunk
        store.keep_policy(_fixed(settings))
        pinned = store.pinned()
        self.rules = Rules(settings, {} if pinned is None else pinned.layout, trunk)
        self._row = next(iter(store.rounds(last=1)), None)
        found = store.checkpoint()
        self._checkpoint = self._initial() if found is None else found
        self.digest, self._payload = self._ends_of_chain()

    @property
    def round(self) -> int:
        """The last finished round; 0 before the first."""
        return 0 if self._row is None else self._row.number

    @property
    def state(self) -> AdapterState:
        """Head, tail and trunk."""
        return self._checkpoint.state

    @property
    def strategy_state(self) -> Mapping[str, Tensor]:
        """The server optimizer's moments."""
        return self._checkpoint.strategy

    def pin(self, layout: Layout) -> None:
        """The first member is there, so the state before the first round is known."""
        self.rules = Rules(self._settings, layout, self._trunk)
        self._checkpoint = self._initial()
        self.digest, self._payload = self._ends_of_chain()

    def digest_at(self, round_number: int) -> str | None:
        """The chain's end at a round; None if there is none."""
        if round_number == self.round:
            return self.digest
        if not 0 <= round_number < self.round:
            return None
        if round_number == 0:
            first = self.rules.initial() if not self.rules.is_hidden else {}
            return first_digest(self._settings.name, payload_digest(first))
        row = self._store.round_row(round_number)
        return None if row is None else row.digest

    def commit(self, row: RoundRow, checkpoint: Checkpoint, outcome: str) -> None:
        """Make a round the newest, first on disk.

        Args:
            row: of the round, its digests still empty.
            checkpoint: the new state.
            outcome: of the attempt, for the store.

        Raises:
            StorageError: it could not be written; nothing has changed.
        """
        payload = payload_digest(_payload(self.rules, checkpoint))
        digest = next_digest(self.digest, self._settings.name, row.number, payload)
        row = replace(row, digest=digest, payload_digest=payload)
        self._store.commit_round(row, checkpoint, outcome)
        self._row, self._checkpoint = row, checkpoint
        self.digest, self._payload = digest, payload

    def begun(self, call: EnterRound, attempt: int, cohort: Sequence[str], cuts: Cuts) -> Answer:
        """ROUND for a member of the cohort."""
        return self._answer(call, attempt, cohort, cuts)

    def final(self, call: EnterRound) -> Answer:
        """ROUND after the last one."""
        return self._answer(call, 0, (), {})

    def _answer(self, call: EnterRound, attempt: int, cohort: Sequence[str], cuts: Cuts) -> Answer:
        has_state = not call.needs_state and call.round >= self.round - 1
        header = Round(
            round=self.round + 1,
            attempt=attempt,
            is_finished=not attempt,
            cohort=sorted(cohort),
            digest=self.digest,
            payload_digest=self._payload,
            # Names of all survivors in every ROUND would grow with the square of the federation;
            # only who has pads to remove needs them.
            survivors=self._row.survivors if self._row and self.rules.is_hidden else [],
            total_weight=0 if self._row is None else self._row.total_weight,
            sum_attempt=0 if self._row is None else self._row.attempts,
            cuts=write_cuts(cuts),
        )
        tensors = _payload(self.rules, self._checkpoint)
        if self._checkpoint.sealed and not has_state:
            tensors["sealed"] = words_of(self._checkpoint.sealed)
        return Answer(header, tensors)

    def _initial(self) -> Checkpoint:
        return Checkpoint(state={} if self.rules.is_hidden else self.rules.initial())

    def _ends_of_chain(self) -> tuple[str, str]:
        payload = payload_digest(_payload(self.rules, self._checkpoint))
        if self._row is None:
            return first_digest(self._settings.name, payload), payload
        if payload != self._row.payload_digest:
            raise StorageError(
                f"{self._store.folder}: the files of round {self.round} are not those that the "
                "store describes; restore the whole folder from a copy"
            )
        return self._row.digest, payload


def _payload(rules: Rules, checkpoint: Checkpoint) -> dict[str, Tensor]:
    """The tensors of ROUND."""
    if not rules.is_hidden:
        return rules.told_of(checkpoint.state)
    return {} if checkpoint.hidden_sum is None else {"sum": checkpoint.hidden_sum}


def _fixed(settings: FederationSettings) -> dict[str, object]:
    """Settings that give the stored states their meaning."""
    # Absent where it is false: as stores of the first release have it.
    mixed: dict[str, object] = {"mixed_cuts": True} if settings.mixed_cuts else {}
    return mixed | {
        "adapter": settings.adapter.model_dump(mode="json"),
        "trunk": settings.trunk.value,
        "strategy.kind": settings.strategy.kind,
        "secure.hides_aggregate": settings.secure.hides_aggregate,
    }
