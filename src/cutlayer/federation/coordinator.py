"""Rounds of one federation: who is in, which stage is open, what is the newest state.

Pure: the clock is passed in, and whoever calls holds a lock. It knows no socket and no thread
(`server.federation`); attempts and rounds are `cycle`'s, calls within an attempt `running`'s, rows
and files `store`'s. Every refusal is raised to the member that caused it alone.
"""

from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor

from cutlayer.errors import ProtocolError
from cutlayer.federation.cuts import Greeting
from cutlayer.federation.cycle import Cycle
from cutlayer.federation.exchange import Answer, Stage
from cutlayer.federation.gathering import Gathering
from cutlayer.federation.membership import check_history, check_join, check_metrics
from cutlayer.federation.running import RunningAttempt
from cutlayer.federation.secure.peers import Verifier
from cutlayer.federation.settings import FederationSettings
from cutlayer.federation.status import Status
from cutlayer.federation.store import FederationStore
from cutlayer.federation.store_rows import MemberRow
from cutlayer.federation.trunk_pool import TrunkPool
from cutlayer.model.adapters import AdapterState
from cutlayer.model.cut import Cut
from cutlayer.wire.federation_messages import EnterRound, Join, Joined, Publish
from cutlayer.wire.header import Header

__all__ = ["Answer", "Coordinator"]

_TOUCH_EVERY_S = 10.0
_RETRY_S = 1.0
"""After a round that could not even begin."""


class Coordinator:
    """One federation's state machine; `tick` it at `next_deadline_s`."""

    def __init__(
        self,
        settings: FederationSettings,
        store: FederationStore,
        trunk: TrunkPool,
        now_s: float,
        verifier: Verifier | None = None,
    ) -> None:
        """Go on after the store's last finished round; an attempt that ran is void.

        Args:
            settings: of the federation.
            store: its one writer.
            trunk: whoever hosts the trunk.
            now_s: seconds of any monotonic clock.
            verifier: checks members' signatures under their keys; None without certificates.

        Raises:
            StorageError: the store's rounds were made with other settings, or are damaged.
        """
        self._settings, self._store = settings, store
        self._cycle = Cycle(settings, store, trunk, verifier)
        self._gathering = Gathering(settings)
        self._members = {row.name for row in store.members() if row.left_at is None}
        self._cuts = store.cuts()
        self._lost: dict[str, float] = {}
        self._is_told_of_returns = False
        self._heard: set[str] = set()
        self._touched_s = now_s
        self._not_before_s = now_s
        self._shown: tuple[object, ...] = ()
        self.version = 0
        """Grows whenever some answer may have become ready."""

    @property
    def is_finished(self) -> bool:
        """All rounds are done."""
        return self._cycle.is_finished

    def join(
        self, member: str, call: Join, now_s: float, greeting: Greeting | None = None
    ) -> Joined:
        """Become a member, or be one still; perhaps with another cut, where cuts are mixed.

        Raises:
            CutlayerError: see `membership.check_join`.
        """
        pinned, trunk = self._store.pinned(), self._cycle.trunk_layout
        admitted = check_join(member, call, self._settings, pinned, trunk, greeting)
        if pinned is None:
            # In memory first: what fails here must not be found on disk at every start.
            self._cycle.history.pin(admitted.pinned.layout)
            self._store.pin(admitted.pinned)
        if admitted.cut is not None:
            self._keep_cut(member, admitted.cut, now_s)
        if member not in self._members:
            self._store.add_member(member)
            self._members.add(member)
        self._hear(member)
        self._settle(now_s)
        return Joined(
            policy=self._settings.policy().told(),
            round=self._cycle.history.round,
            digest=self._cycle.history.digest,
            member=member,
        )

    def leave(self, member: str, now_s: float) -> None:
        """Go; a member that left may join again. No error if it is none."""
        if member not in self._members:
            return
        self._store.remove_member(member)
        self._members.discard(member)
        self._gathering.forget(member)
        self._lost.pop(member, None)
        if self._cycle.attempt is not None:
            self._cycle.attempt.put_out(member, "it left", now_s)
        if not self._members and self._cycle.history.round == 0:
            # Nothing depends yet on what a first member with a wrong model may have brought.
            self._store.unpin()
        self._settle(now_s)

    def publish(self, member: str, call: Publish, now_s: float) -> None:
        """Keep numbers that a member wants shown.

        Raises:
            ProtocolError: malformed, or not a member.
        """
        self._check_member(member, call.federation)
        last = self._cycle.history.round
        known = self._store.metric_names(member, min(call.round, last + 1))
        check_metrics(member, call, last, known)
        self._store.publish(member, call.round, call.metrics)

    def submit(
        self, member: str, call: Header, tensors: Mapping[str, Tensor], now_s: float
    ) -> None:
        """Take ENTER_ROUND, SHARE_KEYS, SHARE_SECRETS, SEND_UPDATE or UNMASK; repeats are harmless.

        Raises:
            CutlayerError: refused; `StepExpired` tells the member to enter the next round.
        """
        self._check_member(member, str(getattr(call, "federation", "")))
        self._hear(member)
        self._cycle.raise_if_stopped()
        self.tick(now_s)
        if isinstance(call, EnterRound):
            self._enter(member, call, now_s)
        else:
            self._cycle.find(member, call).submit(member, call, tensors, now_s)
        self._settle(now_s)

    def answer(self, member: str, call: Header) -> Answer | None:
        """The reply to a call that was submitted; None as long as there is none.

        Raises:
            StepExpired: the call's attempt is over; enter the next round.
            QuorumNotMet, StorageError: the federation has stopped.
        """
        self._cycle.raise_if_stopped()
        if not isinstance(call, EnterRound):
            return self._cycle.find(member, call).answer(member, call)
        if self.is_finished:
            return self._cycle.history.final(call)
        attempt = self._cycle.attempt
        if attempt is None or attempt.is_over or member not in attempt.cohort:
            return None
        if attempt.has_begun(member):
            return None
        return self._cycle.history.begun(call, attempt.number, attempt.cohort, attempt.cuts)

    def seen(self, member: str) -> None:
        """A new connection of the member is there: call it when one has said HELLO."""
        self._is_told_of_returns = True
        self._hear(member)

    def lost(self, member: str, now_s: float) -> None:
        """The member's connection is gone: it waits no longer.

        An attempt waits for it one `phase_deadline_s` more, unless it comes back before. Who
        trains calls nothing here, so while members train this holds only if returns are `seen`.
        """
        if member in self._members:
            self._gathering.forget(member)
            self._lost[member] = now_s
            self._settle(now_s)

    def tick(self, now_s: float) -> None:
        """Do what is due."""
        attempt = self._cycle.attempt
        if attempt is not None:
            for member, until_s in self._awaited(attempt).items():
                if now_s >= until_s:
                    attempt.put_out(member, "its connection was lost", now_s)
            attempt.tick(now_s)
        if now_s - self._touched_s >= _TOUCH_EVERY_S:
            self._touch(now_s)
        self._settle(now_s)

    def next_deadline_s(self) -> float | None:
        """When `tick` has something to do, if nothing comes before; None: never."""
        if self._cycle.stopped is not None or self.is_finished:
            return None
        if self._cycle.attempt is None:
            gathered_s = self._gathering.deadline_s()
            return None if gathered_s is None else max(gathered_s, self._not_before_s)
        attempt = self._cycle.attempt
        return min([attempt.deadline_s, *self._awaited(attempt).values()])

    def count_bytes(self, num_up: int, num_down: int) -> None:
        """Bytes of the federation's calls, as the connection counted them."""
        self._cycle.count_bytes(num_up, num_down)

    def members(self) -> list[MemberRow]:
        """Everybody who ever joined, and who waits now."""
        waiting = self._gathering.waiting
        return [replace(row, is_waiting=row.name in waiting) for row in self._store.members()]

    def status(self) -> Status:
        """Where the federation stands."""
        attempt = self._cycle.attempt
        stage = "gathering" if attempt is None else attempt.stage.name.lower()
        if self._cycle.stopped is not None or self.is_finished:
            stage = "finished" if self._cycle.stopped is None else "stopped"
        return Status(
            federation=self._settings.name,
            round=self._cycle.history.round,
            rounds=self._settings.rounds,
            stage=stage,
            attempt=0 if attempt is None else attempt.number,
            cohort=() if attempt is None else attempt.cohort,
            came=() if attempt is None else tuple(sorted(attempt.came())),
            waiting=tuple(sorted(self._gathering.waiting)),
            stopped="" if self._cycle.stopped is None else str(self._cycle.stopped),
        )

    def trunk_state(self, member: str, cut: Cut | None = None) -> AdapterState:
        """The trunk's adapter that the member's next round starts from.

        Args:
            member: whose.
            cut: leaves out blocks that are not between its two ends; None is all of the trunk.

        Raises:
            ProtocolError: not a member.
        """
        self._check_member(member, self._settings.name)
        history = self._cycle.history
        return history.rules.trunk_of(history.state, member, cut)

    def _check_member(self, member: str, federation: str) -> None:
        if federation != self._settings.name or member not in self._members:
            raise ProtocolError(
                f"{member} is no member of the federation {federation[:40]!r} on this server; "
                "JOIN comes first"
            )

    def _keep_cut(self, member: str, cut: Cut, now_s: float) -> None:
        if self._cuts.get(member) == cut:
            return
        self._store.keep_cut(member, cut)
        self._cuts[member] = cut
        if self._cycle.attempt is not None:
            # Its trunk run and the others' vectors are laid out for the cut before.
            self._cycle.attempt.put_out(member, "it came back with another cut", now_s)

    def _enter(self, member: str, call: EnterRound, now_s: float) -> None:
        history, attempt = self._cycle.history, self._cycle.attempt
        check_history(member, call, history.round, history.digest_at(call.round))
        if self._settings.mixed_cuts and member not in self._cuts:
            raise ProtocolError(f"the cut of {member} is not known yet; JOIN comes first")
        if attempt is not None and member in attempt.cohort:
            if not attempt.has_begun(member):
                return  # ROUND of this attempt is the answer, again
            # A member that took part and asks for a round has lost its secrets: it was restarted.
            attempt.put_out(member, "it began anew", now_s)
        self._gathering.waiting.add(member)

    def _settle(self, now_s: float) -> None:
        """Draw the consequences of whatever has changed."""
        cycle, gathering = self._cycle, self._gathering
        if cycle.attempt is not None and cycle.attempt.is_over:
            # Who did not come to the end is not waited for before the next beginning.
            gathering.present.difference_update(cycle.attempt.out)
            cycle.end(cycle.attempt, now_s)
        gathering.update(now_s)
        is_idle = cycle.attempt is None and cycle.stopped is None and not cycle.is_finished
        if is_idle and now_s >= self._not_before_s and gathering.is_ready(now_s):
            self._begin(now_s)
        attempt = cycle.attempt
        stage = () if attempt is None else (attempt.number, attempt.stage, len(attempt.out))
        shown = (cycle.history.round, cycle.num_failed, stage)
        if self._shown != shown:
            self._shown = shown
            self.version += 1

    def _begin(self, now_s: float) -> None:
        number = self._cycle.next_number()
        cohort = self._gathering.choose(self._cycle.history.round + 1, number)
        cuts = {name: self._cuts[name] for name in cohort} if self._settings.mixed_cuts else {}
        if self._cycle.begin(cohort, now_s, cuts):
            self._gathering.begin(cohort)
        else:
            self._not_before_s = now_s + _RETRY_S

    def _hear(self, member: str) -> None:
        self._lost.pop(member, None)
        self._heard.add(member)
        if member in self._members:
            self._gathering.hear(member)

    def _awaited(self, attempt: RunningAttempt) -> dict[str, float]:
        """Members of the cohort whose connection is lost, and until when they may come back."""
        if attempt.stage is Stage.UPDATES and not self._is_told_of_returns:
            return {}
        names = self._lost.keys() & set(attempt.cohort) - attempt.out.keys()
        return {name: self._lost[name] + self._settings.phase_deadline_s for name in names}

    def _touch(self, now_s: float) -> None:
        self._touched_s = now_s
        self._store.touch(sorted(self._heard & self._members))
        self._heard.clear()
