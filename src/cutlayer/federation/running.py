"""One attempt of a round as it runs: stages, deadlines, who came and who is out.

It does not store, aggregate or choose members (`coordinator`); what the calls hold is `exchange`'s.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

import msgspec
from torch import Tensor

from cutlayer.errors import PermissionRefused, ProtocolError, QuorumNotMet, StepExpired
from cutlayer.federation.chain import payload_digest
from cutlayer.federation.cuts import Cuts
from cutlayer.federation.exchange import STAGE_OF, Answer, Exchange, Stage
from cutlayer.wire.federation_messages import Unmask, Unmasked
from cutlayer.wire.header import Header

__all__ = ["Deadlines", "RunningAttempt"]


@dataclass(frozen=True, kw_only=True)
class Deadlines:
    """How long stages stay open, and how few may be left."""

    phase_s: float
    """Each stage but the training."""
    training_s: float
    """Training and sending the update."""
    quorum: int
    """Fewer members than this are no round."""


class RunningAttempt:
    """Its end shows in `is_done` or `failure`."""

    def __init__(
        self,
        number: int,
        cohort: tuple[str, ...],
        exchange: Exchange,
        deadlines: Deadlines,
        now_s: float,
        cuts: Cuts | None = None,
    ) -> None:
        """Begin.

        Args:
            number: of the attempt.
            cohort: who is asked, sorted.
            exchange: what is exchanged.
            deadlines: how long.
            now_s: the coordinator's clock.
            cuts: of the cohort, where they are mixed.
        """
        self.number, self.cohort, self.exchange = number, cohort, exchange
        self.cuts: Cuts = cuts or {}
        self.began_s = now_s
        self.stage = exchange.first
        self.out: dict[str, str] = {}
        """Members that take no further part, and why."""
        self.failure: str | None = None
        self._deadlines = deadlines
        self._expected = set(cohort)
        self._taken: dict[Stage, dict[str, str]] = {stage: {} for stage in Stage}
        self.deadline_s = now_s + self._seconds()

    @property
    def is_done(self) -> bool:
        """Every stage is closed."""
        return self.stage is Stage.DONE

    @property
    def is_over(self) -> bool:
        """Done or failed."""
        return self.is_done or self.failure is not None

    def came(self, stage: Stage | None = None) -> set[str]:
        """Who sent what the stage asks for; None is the stage that is open."""
        return set(self._taken[self.stage if stage is None else stage])

    def has_begun(self, member: str) -> bool:
        """Whether the member sent anything, or is out: ROUND is no longer its answer."""
        return member in self.out or any(member in taken for taken in self._taken.values())

    def submit(
        self, member: str, call: Header, tensors: Mapping[str, Tensor], now_s: float
    ) -> None:
        """Take a member's call; the same again changes nothing, also without its tensors.

        Raises:
            ProtocolError: not in the cohort, too early, malformed, or other content than before.
            PermissionRefused: keys that the member has not signed.
            StepExpired: too late, or the member is out.
        """
        stage = STAGE_OF[type(call)]
        if member not in self.cohort:
            raise ProtocolError(
                f"member {member} is not in the cohort of attempt {self.number}; wait for ROUND"
            )
        if self._is_repeated(member, stage, call, tensors) or self._is_superfluous(member, stage):
            return
        self._check_turn(member, stage)
        try:
            self.exchange.add(member, call, tensors)
        except (ProtocolError, PermissionRefused) as error:
            # Nobody waits for a member whose message was refused: it will not send another.
            self.put_out(member, f"its {stage.name} was refused: {error}", now_s)
            raise
        self._taken[stage][member] = _digest(call, tensors)
        self._advance(now_s, is_late=False)

    def answer(self, member: str, call: Header) -> Answer | None:
        """The reply to a call that was submitted; None as long as its stage is open.

        Raises:
            StepExpired: the member is out.
        """
        stage = STAGE_OF[type(call)]
        if isinstance(call, Unmask) and (
            member in self._taken[stage] or self._is_superfluous(member, stage)
        ):
            return Answer(Unmasked())
        if member in self._taken[stage] and self.stage > stage:
            return self.exchange.reply(member, stage)
        if member in self.out:
            raise self._expired(member)
        return None

    def put_out(self, member: str, reason: str, now_s: float) -> None:
        """Wait no longer for a member; what it sent stays."""
        if member in self.cohort and not self.is_over:
            self.out.setdefault(member, reason)
            self._advance(now_s, is_late=False)

    def tick(self, now_s: float) -> None:
        """Close the stage if its time is over."""
        while not self.is_over and now_s >= self.deadline_s:
            self._advance(now_s, is_late=True)

    def _is_repeated(
        self, member: str, stage: Stage, call: Header, tensors: Mapping[str, Tensor]
    ) -> bool:
        known = self._taken[stage].get(member)
        if known is None:
            return False
        if known == _digest(call, tensors):
            return True
        if not tensors and known.partition(":")[0] == _digest(call, {}).partition(":")[0]:
            return True
        raise ProtocolError(
            f"member {member} sent other content for {stage.name} of attempt {self.number} than "
            "before; do two processes use its certificate?"
        )

    def _is_superfluous(self, member: str, stage: Stage) -> bool:
        """Others' shares have opened the sum before this member's came: it is not late."""
        return self.is_done and stage is Stage.UNMASK and member in self._taken[Stage.UPDATES]

    def _check_turn(self, member: str, stage: Stage) -> None:
        if stage < self.exchange.first:
            raise ProtocolError(f"{stage.name}: this federation aggregates in the open")
        if member in self.out:
            raise self._expired(member)
        if stage > self.stage:
            raise ProtocolError(
                f"member {member} sent {stage.name} while {self.stage.name} is open"
            )
        if stage < self.stage or member not in self._expected:
            self.out.setdefault(member, f"it was too late for {Stage(stage).name}")
            raise self._expired(member)

    def _expired(self, member: str) -> StepExpired:
        return StepExpired(
            f"member {member} is out of attempt {self.number}: {self.out[member]}; "
            "enter the next round"
        )

    def _advance(self, now_s: float, is_late: bool) -> None:
        """Close stages as long as nobody is missing, or fail."""
        while not self.is_over:
            came = self.came()
            missing = self._expected - came - self.out.keys()
            if missing and not is_late and not self.exchange.is_enough(self.stage):
                if self.stage < Stage.UNMASK and len(came | missing) < self._deadlines.quorum:
                    self.failure = self._too_few(len(came | missing))
                return
            self._close(came, now_s)
            is_late = False

    def _close(self, came: set[str], now_s: float) -> None:
        if self.stage < Stage.UNMASK:
            for member in self._expected - came:
                self.out.setdefault(member, f"it was too late for {self.stage.name}")
        if self.stage < Stage.UNMASK and len(came) < self._deadlines.quorum:
            self.failure = self._too_few(len(came))
            return
        try:
            self.stage = self.exchange.close(self.stage, came)
        except (QuorumNotMet, ProtocolError) as error:
            self.failure = str(error)
            return
        self._expected = came
        self.deadline_s = now_s + self._seconds()

    def _too_few(self, count: int) -> str:
        return (
            f"{count} of {len(self.cohort)} members are left in {self.stage.name}, "
            f"federation.quorum={self._deadlines.quorum}"
        )

    def _seconds(self) -> float:
        is_training = self.stage is Stage.UPDATES
        return self._deadlines.training_s if is_training else self._deadlines.phase_s


def _digest(call: Header, tensors: Mapping[str, Tensor]) -> str:
    """Of the header, and of the tensors if any, with ":" between."""
    header = hashlib.sha256(msgspec.msgpack.encode(call)).hexdigest()
    return f"{header}:{payload_digest(tensors) if tensors else ''}"
