"""Training in a federation: rounds, each from the common adapters to this owner's update.

It does not compute a step (`step`), mask (`handing_in`), connect or load (`client`), nor aggregate:
that is the coordinator's. Losses, labels and tokens stay here; losses are published only where the
owner chose to.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import msgspec
from torch import Tensor

from cutlayer.client.federation_link import FederationLink
from cutlayer.client.handing_in import Credentials, Handover, Learnt
from cutlayer.client.membership import Membership, Standing, joined_states
from cutlayer.client.parts import TrainedParts
from cutlayer.client.remote_trunk import RemoteTrunk
from cutlayer.client.run_state import Progress, RunState, StepRecord
from cutlayer.client.settings import TrainSettings
from cutlayer.client.step import Pull, SplitStep, StepName
from cutlayer.client.train import Report, TrainingData
from cutlayer.data.batches import Batch, batch
from cutlayer.errors import ProtocolError, QuorumNotMet, StepExpired
from cutlayer.federation.settings import FederationPolicy
from cutlayer.federation.strategy import get_strategy
from cutlayer.federation.trunk_pool import UpdateKind
from cutlayer.privacy.update_gate import UpdateGate
from cutlayer.wire.federation_messages import Adopt, Publish, Round
from cutlayer.wire.messages import OpenRun

__all__ = ["Learner", "Member", "steps_per_round"]

_MAX_LOST_IN_A_ROW = 5
"""How often the trunk may lose the same attempt of a round."""


@dataclass(frozen=True, kw_only=True)
class Learner:
    """What trains: parts, trunk and rules of one owner."""

    parts: TrainedParts
    trunk: RemoteTrunk
    step: SplitStep
    settings: TrainSettings
    open_run: OpenRun
    """What the trunk is told of a run; name and federation are filled in here."""


class Member:
    """Takes part in a federation until it ends; started again, it goes on where that stands."""

    def __init__(
        self,
        calls: FederationLink,
        membership: Membership,
        learner: Learner,
        data: TrainingData,
        gate: UpdateGate,
        credentials: Credentials,
        state: RunState,
    ) -> None:
        """
        Args:
            calls: to the coordinator.
            membership: the rules that were joined, and where this member stands in them.
            learner: what trains.
            data: rows, and their order over all rounds.
            gate: what may leave.
            credentials: who this is.
            state: the run's folder.
        """
        self._calls, self._membership, self._learner = calls, membership, learner
        self._data = data
        self._gate, self._credentials, self._state = gate, credentials, state
        self._policy = membership.policy
        self._strategy = get_strategy(self._policy.strategy)
        self._steps_per_round = steps_per_round(self._policy)
        self._update_keys = membership.update_keys
        self._handover: Handover | None = None
        self.progress = Progress()

    @property
    def mixes_cuts(self) -> bool:
        """Whether members may have different cuts."""
        return self._policy.mixed_cuts

    def run(
        self,
        on_step: Callable[[Report], None] = lambda report: None,
        is_interrupted: Callable[[], bool] = lambda: False,
    ) -> Progress:
        """Train round after round.

        Args:
            on_step: told of every step.
            is_interrupted: asked between rounds; one may join again later.

        Raises:
            TransportError: the server stayed away; start again later.
            QuorumNotMet: the federation gave up.
        """
        if not self._policy.secure.enabled:
            self._gate.require_plain_accepted()
        self._restore()
        lost, num_lost = (0, 0), 0
        while True:
            if is_interrupted():
                return self._pause()
            standing = self._membership.enter(self._calls)
            self._take_over(standing)
            if standing.begun.is_finished:
                return self._finish()
            try:
                self._take_part(standing, on_step)
            except (StepExpired, QuorumNotMet):
                # The attempt is void, or the trunk lost this member's run: enter again. How many
                # attempts are too many is the coordinator's to say; the same one has to get on.
                again = standing.begun.round, standing.begun.attempt
                lost, num_lost = again, num_lost + 1 if again == lost else 1
                if num_lost > _MAX_LOST_IN_A_ROW:
                    raise

    def _pause(self) -> Progress:
        """Keep the records of a round whose result has not come yet; the weights wait for it."""
        steps = self._state.saved_steps()
        if steps and steps[-1] == self.progress.step:
            tensors = self._state.load(steps[-1]).tensors
            self._state.save(self.progress, tensors, is_pinned=False)
        return self.progress

    def _restore(self) -> None:
        steps = self._state.saved_steps()
        if steps:
            self.progress = self._state.load(steps[-1]).progress

    def _take_over(self, standing: Standing) -> None:
        """Begin from the common adapters, and keep them: they are the last round's result."""
        parts, done = self._learner.parts, standing.begun.round - 1
        parts.start_from(standing.adapters)
        parts.set_training(True)
        self._learner.step.pending_commit = None
        if done not in self._state.saved_steps():
            self.progress.step = done
            self._state.save(self.progress, parts.state(), is_pinned=False)
        self._membership.keep(standing.begun)

    def _take_part(self, standing: Standing, on_step: Callable[[Report], None]) -> None:
        """One attempt of a round: agree on masks, train, hand in."""
        begun, start = standing.begun, standing.adapters
        handover = self._handover_of(standing)
        handover.agree()
        update, records = self._learn(begun, handover.name, start, on_step)
        weight = sum(record.num_scored for record in records)
        self._membership.hand_in(begun)
        handover.send(Learnt(update=update, weight=weight), self._gate, start)
        self.progress.history.extend(records)
        self._publish(begun, records)

    def _learn(
        self,
        begun: Round,
        run_id: str,
        start: Mapping[str, Tensor],
        on_step: Callable[[Report], None],
    ) -> tuple[dict[str, Tensor], list[StepRecord]]:
        """Train on the attempt's run; begun again where the trunk lost it."""
        opened = msgspec.structs.replace(
            self._learner.open_run, run_id=run_id, federation=self._policy.name, saved_steps=[0]
        )
        for _ in range(_MAX_LOST_IN_A_ROW):
            # Raises StepExpired where the attempt itself is over.
            self._learner.trunk.open_run(opened)
            self._learner.parts.start_from(start)
            self._learner.step.pending_commit = None
            try:
                if self._strategy.sends is UpdateKind.GRADIENT:
                    return self._mean_gradient(begun, run_id, on_step)
                return self._trained_change(begun, run_id, start, on_step)
            except StepExpired:
                continue
        raise StepExpired(f"the trunk lost run {run_id} {_MAX_LOST_IN_A_ROW} times")

    def _handover_of(self, standing: Standing) -> Handover:
        """The same one for the same attempt: its secrets are shared already."""
        known, begun = self._handover, standing.begun
        if known is None or not known.is_of(begun):
            share, least = self._membership.share_of(standing), self._membership.min_cohort
            known = Handover(self._calls, self._policy, begun, self._credentials, share, least)
            self._handover = known
        return known

    def _trained_change(
        self,
        begun: Round,
        run_id: str,
        start: Mapping[str, Tensor],
        on_step: Callable[[Report], None],
    ) -> tuple[dict[str, Tensor], list[StepRecord]]:
        """Ordinary optimizer steps; what they changed."""
        learner, pull = self._learner, self._pull()
        records = []
        for number in range(1, self._policy.local_steps + 1):
            name = self._step_name(begun, run_id, number)
            sums = learner.step.gradients(name, self._batches(number))
            settings = learner.settings
            record = learner.step.finish(name, sums, settings.lr, settings.clip_norm, pull)
            records.append(self._reported(begun, number, record, on_step))
        learner.trunk.finish(run_id, self._policy.local_steps, learner.step.pending_commit)
        learner.step.pending_commit = None
        trained = joined_states(learner.parts.adapter_states())
        return {key: trained[key] - start[key] for key in self._update_keys}, records

    def _mean_gradient(
        self, begun: Round, run_id: str, on_step: Callable[[Report], None]
    ) -> tuple[dict[str, Tensor], list[StepRecord]]:
        """The gradient of one step's rows, per scored token; nobody steps alone."""
        name = self._step_name(begun, run_id, 1)
        sums = self._learner.step.gradients(name, self._batches(1))
        gradient = joined_states(self._learner.parts.gradient_states())
        self._learner.parts.clear_gradients()
        record = StepRecord(
            step=1,
            loss=sums.loss_sum / max(1, sums.num_scored),
            num_tokens=sums.num_tokens,
            num_scored=sums.num_scored,
            grad_norm=0.0,
            lr=self._policy.strategy.lr,
        )
        mean = {key: gradient[key] / max(1, sums.num_scored) for key in self._update_keys}
        return mean, [self._reported(begun, 1, record, on_step)]

    def _step_name(self, begun: Round, run_id: str, number: int) -> StepName:
        # Without the attempt: what a round begun again computes anew leaves with the same noise.
        weights = f"{self._policy.name}.r{begun.round}.s{number - 1}"
        return StepName(run_id=run_id, step=number, weights=weights)

    def _batches(self, number: int) -> list[Batch]:
        # By updates, not by rounds: the sums of two attempts of a round, one of them without this
        # member, would differ by its update if both came of the same rows.
        data, first = self._data, self._membership.num_handed_in * self._steps_per_round
        step = (first + number - 1) % data.plan.num_steps
        return [batch(data.train, rows) for rows in data.plan.micro_batches(step)]

    def _pull(self) -> Pull | None:
        weight = self._strategy.proximal_weight
        if not weight:
            return None
        return Pull(weight=weight, start=self._learner.parts.adapter_states())

    def _reported(
        self, begun: Round, number: int, record: StepRecord, on_step: Callable[[Report], None]
    ) -> StepRecord:
        """Numbered within the federation, as its owner sees it."""
        before = (begun.round - 1) * self._steps_per_round
        record = msgspec.structs.replace(record, step=before + number)
        num_steps = self._policy.rounds * self._steps_per_round
        on_step(
            Report(
                record=record,
                num_steps=num_steps,
                validation_loss=None,
                steps_per_round=self._steps_per_round,
            )
        )
        return record

    def _publish(self, begun: Round, records: Sequence[StepRecord]) -> None:
        num_scored = sum(record.num_scored for record in records)
        loss = sum(r.loss * r.num_scored for r in records) / max(1, num_scored)
        name = f"{self._policy.name}.r{begun.round}.a{begun.attempt}"
        shown = self._gate.metrics({"loss": loss}, name)
        if shown is not None:
            self._calls.publish(
                Publish(federation=self._policy.name, round=begun.round, metrics=shown)
            )

    def _finish(self) -> Progress:
        """Keep the trunk's share of the result under the owner's own run; evaluate it."""
        learner, done = self._learner, self.progress.step
        adopted = self._calls.adopt(
            Adopt(federation=self._policy.name, round=done, run_id=self._state.run_id)
        )
        if adopted != done:
            raise ProtocolError(f"the server adopted round {adopted} where {done} was asked for")
        if self._data.validation:
            self.progress.evaluations[str(done)] = self._evaluate(done)
            self._state.save(self.progress, learner.parts.state(), is_pinned=False)
        return self.progress

    def _evaluate(self, done: int) -> float:
        """Mean loss over the validation rows with the federation's result."""
        learner = self._learner
        learner.trunk.open_run(
            msgspec.structs.replace(learner.open_run, run_id=self._state.run_id, saved_steps=[done])
        )
        size = learner.settings.micro_batch_rows or learner.settings.rows_per_step
        chunks = self._data.validation_chunks(size)
        batches = [batch(self._data.validation, chunk) for chunk in chunks]
        name = StepName(run_id=self._state.run_id, step=done, weights=f"round{done}")
        return learner.step.mean_loss(name, batches)


def steps_per_round(policy: FederationPolicy) -> int:
    """Optimizer steps, or gradients, of a member in a round."""
    takes_gradient = get_strategy(policy.strategy).sends is UpdateKind.GRADIENT
    return 1 if takes_gradient else policy.local_steps
