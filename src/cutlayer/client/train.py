"""Split fine-tuning at the data owner: one step, then all of them.

It does not read data files, load models or open connections (`client`), and nothing leaves but
through the two boundaries. Losses, labels and tokens stay here.

Shapes: N = tokens of all rows of a micro-batch, D = hidden size.
"""

import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import msgspec
import torch
from torch import Tensor

from cutlayer.client.parts import TrainedParts
from cutlayer.client.remote_trunk import PendingCall, RemoteTrunk, trunk_sq_norm
from cutlayer.client.run_state import Progress, RunState, StepRecord
from cutlayer.client.schedule import learning_rate
from cutlayer.client.settings import TrainSettings
from cutlayer.data.batches import Batch, BatchPlan, batch
from cutlayer.data.template import Example
from cutlayer.errors import ConfigError, ProtocolError, StepExpired
from cutlayer.model.loss import completion_loss_sum
from cutlayer.model.optimizer import gradient_scale
from cutlayer.privacy.boundary import Boundary
from cutlayer.wire.messages import Backward, Forward, OpenRun, Step

__all__ = ["Boundaries", "Report", "Trainer", "TrainingData"]

_MAX_LOST_IN_A_ROW = 5
"""How often the server may lose the same stretch of steps."""


@dataclass(frozen=True, kw_only=True)
class TrainingData:
    """Rows of the owner and the order in which they are learnt."""

    train: Sequence[Example]
    validation: Sequence[Example]
    plan: BatchPlan


@dataclass(frozen=True, kw_only=True)
class Boundaries:
    """The two gates of training."""

    activations: Boundary
    gradients: Boundary


@dataclass(frozen=True, kw_only=True)
class Report:
    """What a caller sees after every step."""

    record: StepRecord
    num_steps: int
    validation_loss: float | None


@dataclass(kw_only=True)
class _Micro:
    """A micro-batch under way: what its backward will need."""

    number: int
    is_last: bool
    batch: Batch
    noised_ND: Tensor
    forward: PendingCall
    backward: PendingCall | None = None


class Trainer:
    """Drives one run from the newest step that both sides have to its end."""

    def __init__(
        self,
        parts: TrainedParts,
        trunk: RemoteTrunk,
        boundaries: Boundaries,
        data: TrainingData,
        settings: TrainSettings,
        state: RunState,
        open_run: OpenRun,
    ) -> None:
        """
        Args:
            parts: head and tail with adapters and optimizers.
            trunk: the server's part.
            boundaries: gates for activations and gradients.
            data: rows and their order.
            settings: rates, sizes, intervals.
            state: the run's folder.
            open_run: what the server is told of the run; saved steps are filled in here.
        """
        self._parts = parts
        self._trunk = trunk
        self._boundaries = boundaries
        self._data = data
        self._settings = settings
        self._state = state
        self._open_run = open_run
        self._pending_commit: Step | None = None
        self.progress = Progress()

    def run(self, on_step: Callable[[Report], None] = lambda report: None) -> Progress:
        """Train to the end; a lost step makes both sides go back to their newest common one.

        Raises:
            TransportError: the server stayed away; start again later, nothing saved is lost.
            ConfigError: values became NaN, and what the server answered.
        """
        self._open()
        furthest, num_lost = self.progress.step, 0
        while True:
            try:
                if self._is_done():
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
        self._parts.set_training(False)
        try:
            sums = [self._loss_of(chunk) for chunk in self._validation_chunks()]
        finally:
            self._parts.set_training(True)
        loss = math.fsum(s for s, _ in sums) / max(1, sum(n for _, n in sums))
        return _finite(loss, "validation loss", self.progress.step)

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
        """One optimizer step: micro-batches flow through, in order, several at once."""
        chunks = self._data.plan.micro_batches(step - 1)
        batches = [batch(self._data.train, chunk) for chunk in chunks]
        ahead: deque[_Micro] = deque()
        behind: deque[_Micro] = deque()
        loss_sum = 0.0
        sq_norm = 0.0
        for number, chosen in enumerate(batches):
            is_last = number == len(batches) - 1
            ahead.append(self._forward(step, number, chosen, is_last))
            if len(ahead) == self._settings.in_flight:
                loss_sum += self._tail(step, ahead[0])
                behind.append(ahead.popleft())
            if len(behind) == self._settings.in_flight:
                sq_norm = self._head_backward(behind.popleft())
        while ahead:
            loss_sum += self._tail(step, ahead[0])
            behind.append(ahead.popleft())
        while behind:
            sq_norm = self._head_backward(behind.popleft())
        return self._finish(step, batches, loss_sum, sq_norm)

    def _forward(self, step: int, number: int, chosen: Batch, is_last: bool) -> _Micro:
        """Head, gate, up."""
        noised_ND, call = self._send_up(chosen, step, number, is_evaluation=False)
        return _Micro(
            number=number, is_last=is_last, batch=chosen, noised_ND=noised_ND, forward=call
        )

    def _send_up(
        self, chosen: Batch, step: int, number: int, is_evaluation: bool
    ) -> tuple[Tensor, PendingCall]:
        self._parts.seed_dropout(step, number)
        h_ND = self._parts.head_forward(chosen.rows)
        noised_ND, released = self._boundaries.activations.release(
            h_ND, chosen.rows, _row_names(chosen), self._version()
        )
        call = Forward(
            run_id=self._state.run_id,
            step=step,
            micro=number,
            lengths=list(chosen.rows.lengths),
            commit=self._pending_commit,
            is_evaluation=is_evaluation,
        )
        pending = self._trunk.forward(released, call)
        # With one call only: that call is repeated until it is answered.
        self._pending_commit = None
        return noised_ND, pending

    def _tail(self, step: int, micro: _Micro) -> float:
        """Down, tail, loss, gate, gradient up; the summed loss."""
        y_ND = micro.forward.tensor("y").requires_grad_()
        loss_sum, _ = completion_loss_sum(
            self._parts.tail, y_ND, micro.batch.rows, micro.batch.labels_N
        )
        loss_sum.backward()
        assert y_ND.grad is not None
        if not self._needs_backward():
            return float(loss_sum.detach())
        _, released = self._boundaries.gradients.release(
            y_ND.grad, micro.batch.rows, _row_names(micro.batch), f"step{self.progress.step}"
        )
        call = Backward(
            run_id=self._state.run_id,
            step=step,
            micro=micro.number,
            is_last=micro.is_last,
        )
        micro.backward = self._trunk.backward(released, call)
        return float(loss_sum.detach())

    def _head_backward(self, micro: _Micro) -> float:
        """Gradient down, head's backward; the trunk's squared norm after the last micro-batch."""
        if micro.backward is None:
            return 0.0
        reply = micro.backward.result()
        if self._open_run.wants_input_grad:
            micro.noised_ND.backward(micro.backward.tensor("grad"))
        return trunk_sq_norm(reply) if micro.is_last else 0.0

    def _finish(
        self, step: int, batches: Sequence[Batch], loss_sum: float, remote_sq_norm: float
    ) -> StepRecord:
        _finite(loss_sum, "loss", step)
        num_scored = sum(chosen.num_scored for chosen in batches)
        own_sq_norm = self._parts.sq_norm()
        lr = learning_rate(step, self._data.plan.num_steps, self._settings)
        sq_norm = _finite(own_sq_norm + remote_sq_norm, "squared gradient norm", step)
        self._parts.step(gradient_scale(sq_norm, num_scored, self._settings.clip_norm), lr)
        self._pending_commit = Step(
            step=step, client_sq_norm=own_sq_norm, num_tokens=num_scored, lr=lr
        )
        return StepRecord(
            step=step,
            loss=loss_sum / max(1, num_scored),
            num_tokens=sum(chosen.rows.num_tokens for chosen in batches),
            num_scored=num_scored,
            grad_norm=math.sqrt(sq_norm) / max(1, num_scored),
            lr=lr,
        )

    def _loss_of(self, indices: Sequence[int]) -> tuple[float, int]:
        chosen = batch(self._data.validation, indices)
        with torch.no_grad():
            _, call = self._send_up(chosen, self.progress.step, 0, is_evaluation=True)
            loss_sum, num_scored = completion_loss_sum(
                self._parts.tail, call.tensor("y"), chosen.rows, chosen.labels_N
            )
        return float(loss_sum), num_scored

    def _validation_chunks(self) -> list[range]:
        size = self._settings.micro_batch_rows or self._settings.rows_per_step
        count = len(self._data.validation)
        return [range(first, min(first + size, count)) for first in range(0, count, size)]

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
        self._pending_commit = None

    def _save_if_unsaved(self) -> None:
        if self.progress.step not in self._state.saved_steps():
            self._save()

    def _save(self) -> None:
        """The server first: the client's newest step is then always one that both have."""
        is_best = self.progress.best_step == self.progress.step
        step = self.progress.step
        self._trunk.save(self._state.run_id, step, self._pending_commit, is_best)
        self._pending_commit = None
        self._state.save(self.progress, self._parts.state(), is_pinned=is_best)

    def _needs_backward(self) -> bool:
        return self._open_run.wants_input_grad or self._parts.trunk_trains

    def _version(self) -> str:
        return f"step{self.progress.step}" if self._open_run.wants_input_grad else "frozen"


def _finite(value: float, name: str, step: int) -> float:
    if not math.isfinite(value):
        raise ConfigError(
            f"step {step}: the {name} is {value}, training diverged; nothing was saved since the "
            "last saved step: lower train.lr, or use float32"
        )
    return value


def _row_names(chosen: Batch) -> list[str]:
    return [f"row{row_id}" for row_id in chosen.row_ids]
