"""Split fine-tuning at the data owner: from the newest step that both sides have to the end.

It does not compute a step (`step`), read data files, load models or open connections (`client`).
Losses, labels and tokens stay here.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import msgspec
from torch import Tensor

from cutlayer.client.parts import TrainedParts
from cutlayer.client.remote_trunk import RemoteTrunk
from cutlayer.client.run_state import Progress, RunState, StepRecord
from cutlayer.client.schedule import learning_rate
from cutlayer.client.settings import TrainSettings
from cutlayer.client.step import SplitStep, StepName
from cutlayer.data.batches import BatchPlan, batch
from cutlayer.data.template import Example
from cutlayer.errors import ProtocolError, StepExpired
from cutlayer.wire.messages import OpenRun

__all__ = ["Report", "Trainer", "TrainingData"]

_MAX_LOST_IN_A_ROW = 5
"""How often the server may lose the same stretch of steps."""


@dataclass(frozen=True, kw_only=True)
class TrainingData:
    """Rows of the owner and the order in which they are learnt."""

    train: Sequence[Example]
    validation: Sequence[Example]
    plan: BatchPlan

    def validation_chunks(self, rows_per_chunk: int) -> list[range]:
        """Places of the validation rows, cut to calls of the trunk."""
        count = len(self.validation)
        firsts = range(0, count, rows_per_chunk)
        return [range(first, min(first + rows_per_chunk, count)) for first in firsts]


@dataclass(frozen=True, kw_only=True)
class Report:
    """What a caller sees after every step."""

    record: StepRecord
    num_steps: int
    validation_loss: float | None
    steps_per_round: int | None = None
    """In a federation; None where there are no rounds."""


class Trainer:
    """Drives one run from the newest step that both sides have to its end."""

    def __init__(
        self,
        parts: TrainedParts,
        trunk: RemoteTrunk,
        step: SplitStep,
        data: TrainingData,
        settings: TrainSettings,
        state: RunState,
        open_run: OpenRun,
    ) -> None:
        """
        Args:
            parts: head and tail with adapters and optimizers.
            trunk: the server's part.
            step: computes one step.
            data: rows and their order.
            settings: rates, sizes, intervals.
            state: the run's folder.
            open_run: what the server is told of the run; saved steps are filled in here.
        """
        self._parts = parts
        self._trunk = trunk
        self._split = step
        self._data = data
        self._settings = settings
        self._state = state
        self._open_run = open_run
        self.progress = Progress()

    def run(
        self,
        on_step: Callable[[Report], None] = lambda report: None,
        is_interrupted: Callable[[], bool] = lambda: False,
    ) -> Progress:
        """Train to the end; a lost step makes both sides go back to their newest common one.

        Args:
            on_step: told of every step.
            is_interrupted: asked between steps; the run is saved then and may go on later.

        Raises:
            TransportError: the server stayed away; start again later, nothing saved is lost.
            ConfigError: values became NaN, and what the server answered.
        """
        self._open()
        furthest, num_lost = self.progress.step, 0
        while True:
            try:
                if self._is_done() or is_interrupted():
                    self._save_if_unsaved()
                    return self.progress
                on_step(self._advance())
            except StepExpired:
                num_lost += 1
                if num_lost > _MAX_LOST_IN_A_ROW:
                    raise
                self._open()
            if self.progress.step > furthest:
                furthest, num_lost = self.progress.step, 0

    def evaluate(self) -> float:
        """Mean loss over the validation rows at the weights of the last finished step."""
        size = self._settings.micro_batch_rows or self._settings.rows_per_step
        chunks = self._data.validation_chunks(size)
        batches = [batch(self._data.validation, chunk) for chunk in chunks]
        return self._split.mean_loss(self._name(self.progress.step), batches)

    def first_logits(self, rows: Sequence[Example]) -> Tensor:
        """Logits [B, V] where each row's first scored token is predicted, at the weights of the
        last finished step."""
        chosen = batch(rows, range(len(rows)))
        return self._split.first_logits(self._name(self.progress.step), chosen)

    def _advance(self) -> Report:
        step = self.progress.step + 1
        record = self._step(step)
        self.progress.history.append(record)
        self.progress.step = step
        validation_loss = self._evaluate_if_due()
        if step % self._settings.save_every == 0 or validation_loss is not None:
            self._save()
        return Report(
            record=record, num_steps=self._data.plan.num_steps, validation_loss=validation_loss
        )

    def _step(self, step: int) -> StepRecord:
        chunks = self._data.plan.micro_batches(step - 1)
        sums = self._split.gradients(
            self._name(step), [batch(self._data.train, chunk) for chunk in chunks]
        )
        self._compare_if_drawn()
        lr = learning_rate(step, self._data.plan.num_steps, self._settings)
        return self._split.finish(self._name(step), sums, lr, self._settings.clip_norm)

    def _compare_if_drawn(self) -> None:
        """Have the server declare its adapter, only now that its replies are here."""
        checks = self._trunk.checks
        if not checks.wants_step:
            return
        declared = None
        if checks.wants_adapter:
            self._save_if_unsaved()
            declared = self._trunk.pull_adapter(self._state.run_id, self.progress.step)
        checks.compare_step(declared, self.progress.history)

    def _name(self, step: int) -> StepName:
        weights = f"step{self.progress.step}"
        return StepName(run_id=self._state.run_id, step=step, weights=weights)

    def _evaluate_if_due(self) -> float | None:
        """Evaluate at the interval and at the end; remember the best step."""
        progress, step = self.progress, self.progress.step
        every = self._settings.eval_every
        is_due = step == self._data.plan.num_steps or (every is not None and step % every == 0)
        if not is_due or not self._data.validation:
            return None
        loss = self.evaluate()
        best = progress.evaluations.get(str(progress.best_step), math.inf)
        progress.evaluations[str(step)] = loss
        if loss < best:
            progress.best_step, progress.num_worse = step, 0
        else:
            progress.num_worse += 1
        return loss

    def _is_done(self) -> bool:
        patience = self._settings.patience
        is_patient = patience is None or self.progress.num_worse < patience
        return self.progress.step >= self._data.plan.num_steps or not is_patient

    def _open(self) -> None:
        """Bring both sides to the newest step that both have saved."""
        if not self._state.saved_steps():
            self._state.save(self.progress, self._parts.state(), is_pinned=False)
        opened = msgspec.structs.replace(
            self._open_run, run_id=self._state.run_id, saved_steps=self._state.saved_steps()
        )
        step = self._trunk.open_run(opened)
        if step not in opened.saved_steps:
            raise ProtocolError(
                f"the server went to step {step}, offered were {opened.saved_steps}"
            )
        saved = self._state.go_back_to(step)
        self._parts.load(saved.tensors)
        self._parts.set_training(True)
        self.progress = saved.progress
        self._split.pending_commit = None

    def _save_if_unsaved(self) -> None:
        if self.progress.step not in self._state.saved_steps():
            self._save()

    def _save(self) -> None:
        """The server first: the client's newest step is then always one that both have."""
        is_best = self.progress.best_step == self.progress.step
        step = self.progress.step
        self._trunk.save(self._state.run_id, step, self._split.pending_commit, is_best)
        self._split.pending_commit = None
        self._state.save(self.progress, self._parts.state(), is_pinned=is_best)
