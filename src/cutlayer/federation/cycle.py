"""The cycle of attempts and rounds: begin one, see it end, make its result durable, or give up.

It does not know who waits (`gathering`) or who may join (`membership`).
"""

from collections.abc import Sequence
from contextlib import suppress

from cutlayer.errors import (
    CutlayerError,
    ProtocolError,
    QuorumNotMet,
    StepExpired,
    StorageError,
)
from cutlayer.federation.checkpoints import Checkpoint
from cutlayer.federation.cuts import Cuts
from cutlayer.federation.exchange import Exchange, PlainExchange, SecureExchange
from cutlayer.federation.history import History
from cutlayer.federation.membership import check_begun
from cutlayer.federation.rounds import Collected, next_state, trunk_contributions
from cutlayer.federation.running import Deadlines, RunningAttempt
from cutlayer.federation.secure.attempt import Attempt
from cutlayer.federation.secure.peers import Verifier
from cutlayer.federation.settings import FederationSettings
from cutlayer.federation.store import FederationStore
from cutlayer.federation.store_rows import RoundRow
from cutlayer.federation.strategy import get_strategy
from cutlayer.federation.trunk_pool import TrunkPool
from cutlayer.wire.federation_messages import (
    SendUpdate,
    ShareKeys,
    ShareSecrets,
    Unmask,
    round_run_id,
)
from cutlayer.wire.header import Header

__all__ = ["Cycle"]


class Cycle:
    """At most one attempt runs; the last one that succeeded still answers repeated calls."""

    def __init__(
        self,
        settings: FederationSettings,
        store: FederationStore,
        trunk: TrunkPool,
        verifier: Verifier | None = None,
    ) -> None:
        """Go on after the store's last finished round.

        Raises:
            StorageError: the store's rounds were made with other settings, or are damaged.
        """
        self._settings, self._store, self._trunk = settings, store, trunk
        self._verifier = verifier
        self.trunk_layout = trunk.layout(settings.round_adapter())
        self.history = History(settings, store, self.trunk_layout)
        self._strategy = get_strategy(settings.strategy)
        self._strategy.load(self.history.strategy_state)
        self.attempt: RunningAttempt | None = None
        self.stopped: CutlayerError | None = None
        """Why no round can follow, until the server is started again."""
        self.num_failed = 0
        """Attempts of this round that failed since the start of the process."""
        self._succeeded: RunningAttempt | None = None
        self._failure = ""
        self._began_at = ""
        self._num_up = self._num_down = 0

    @property
    def is_finished(self) -> bool:
        """All rounds are done."""
        return self.history.round >= self._settings.rounds

    def raise_if_stopped(self) -> None:
        """Raise the reason, for each caller anew."""
        if self.stopped is not None:
            raise type(self.stopped)(str(self.stopped))

    def count_bytes(self, num_up: int, num_down: int) -> None:
        """Add to the attempt's bytes."""
        self._num_up += num_up
        self._num_down += num_down

    def find(self, member: str, call: Header) -> RunningAttempt:
        """The attempt that a call belongs to.

        Raises:
            StepExpired: it is over.
            ProtocolError, StorageError: it never began here.
        """
        if not isinstance(call, ShareKeys | ShareSecrets | SendUpdate | Unmask):
            raise ProtocolError(f"{type(call).__name__} is no call of a round")
        named, last = (call.round, call.attempt), self.history.round
        if self.attempt is not None and named == (last + 1, self.attempt.number):
            return self.attempt
        if self._succeeded is not None and named == (last, self._succeeded.number):
            return self._succeeded
        check_begun(member, named, last, self._store.last_attempt(last + 1))
        why = f" ({self._failure})" if self._failure else ""
        raise StepExpired(
            f"attempt {call.attempt} of round {call.round} is over{why}; enter the next round"
        )

    def next_number(self) -> int:
        """Of the attempt that would begin now."""
        return self._store.last_attempt(self.history.round + 1) + 1

    def begin(self, cohort: Sequence[str], now_s: float, cuts: Cuts) -> bool:
        """Begin the next round, or begin it again; False if that was not possible.

        Args:
            cohort: who is asked.
            now_s: the coordinator's clock.
            cuts: of the cohort; empty unless they are mixed.
        """
        round_number, number = self.history.round + 1, self.next_number()
        self._num_up = self._num_down = 0
        try:
            self._began_at = self._store.time()
            self._store.begin_attempt(round_number, number, cohort)
            rules, state = self.history.rules, self.history.state
            self._trunk.begin_round(
                self._run_id(number),
                self._settings.round_adapter(),
                {member: rules.trunk_of(state, member, cuts.get(member)) for member in cohort},
            )
            self.attempt = self._running(number, tuple(cohort), now_s, cuts)
        except CutlayerError as error:
            self._give_up(number, error)
            return False
        self._succeeded = None
        return True

    def end(self, attempt: RunningAttempt, now_s: float) -> None:
        """Make the round of an attempt that is over, or give the attempt up."""
        self.attempt = None
        try:
            if attempt.failure is not None:
                raise QuorumNotMet(attempt.failure)
            self._commit(attempt, now_s)
        except CutlayerError as error:
            self._give_up(attempt.number, error)
            return
        self._succeeded, self._failure, self.num_failed = attempt, "", 0

    def _running(
        self, number: int, cohort: tuple[str, ...], now_s: float, cuts: Cuts
    ) -> RunningAttempt:
        settings, rules = self._settings, self.history.rules
        exchange: Exchange = PlainExchange(rules, cuts)
        if settings.secure.enabled:
            terms = Attempt(
                federation=settings.name,
                round=self.history.round + 1,
                attempt=number,
                cohort=cohort,
                policy=settings.secure,
                cuts=cuts,
                vector=rules.vector(cuts),
            )
            exchange = SecureExchange(rules, terms, self._verifier)
        deadlines = Deadlines(
            phase_s=settings.phase_deadline_s,
            training_s=settings.round_deadline_s,
            quorum=settings.quorum,
        )
        return RunningAttempt(number, cohort, exchange, deadlines, now_s, cuts)

    def _commit(self, attempt: RunningAttempt, now_s: float) -> None:
        """Aggregate, and make it durable."""
        history, kind, ends = self.history, self._strategy.sends, attempt.exchange.result()
        run_id = self._run_id(attempt.number)
        collected = self._trunk.collect(run_id, ends.survivors, kind)
        state = history.rules.completed(history.state, collected)
        trunk = trunk_contributions(history.rules, state, kind, collected)
        checkpoint = Checkpoint(
            state=next_state(self._strategy, state, ends, trunk),
            strategy=self._strategy.state(),
            hidden_sum=ends.hidden_sum,
            sealed=ends.sealed,
        )
        history.commit(self._row(attempt, ends, now_s), checkpoint, trunk.outcome)
        with suppress(CutlayerError):  # the round is safe; a lost replica has forgotten it anyway
            self._trunk.end_round(run_id)

    def _row(self, attempt: RunningAttempt, ends: Collected, now_s: float) -> RoundRow:
        return RoundRow(
            number=self.history.round + 1,
            attempts=attempt.number,
            began_at=self._began_at,
            ended_at=self._store.time(),
            seconds=now_s - attempt.began_s,
            cohort=list(attempt.cohort),
            survivors=list(ends.survivors),
            stragglers=sorted(set(attempt.cohort) - set(ends.survivors)),
            total_weight=ends.total_weight,
            bytes_up=self._num_up,
            bytes_down=self._num_down,
            digest="",
            payload_digest="",
        )

    def _give_up(self, number: int, error: CutlayerError) -> None:
        """The attempt is void: its members hear StepExpired, and begin again."""
        self._failure = str(error)
        self.num_failed += 1
        with suppress(CutlayerError):
            self._trunk.end_round(self._run_id(number))
        if isinstance(error, StorageError):
            self.stopped = error
            return
        try:
            self._store.fail_attempt(self.history.round + 1, number, self._failure)
        except StorageError as full:
            self.stopped = full
        if self.num_failed >= self._settings.max_attempts:
            self.stopped = QuorumNotMet(
                f"round {self.history.round + 1} of {self._settings.name} was begun "
                f"{self.num_failed} times without success (federation.max_attempts); the last "
                f"time: {error}. Rounds before it are kept; start the server again when enough "
                "members are back"
            )

    def _run_id(self, number: int) -> str:
        return round_run_id(self._settings.name, self.history.round + 1, number)
