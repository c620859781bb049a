"""One optimizer step through the split, at the data owner: gradients, then the step itself.

It does not choose rows, save, open runs or decide what follows (`train`, `member`), and nothing
leaves but through the two boundaries. Losses, labels and tokens stay here.

Shapes: N = tokens of all rows of a micro-batch, D = hidden size.
"""

import math
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cutlayer.client.kept import Kept, kept
from cutlayer.client.link import PendingCall
from cutlayer.client.parts import TrainedParts
from cutlayer.client.remote_trunk import CallNames, RemoteTrunk, trunk_sq_norm
from cutlayer.client.returned import TrainingCall
from cutlayer.client.run_state import StepRecord
from cutlayer.data.batches import Batch
from cutlayer.errors import ConfigError
from cutlayer.model.denoiser import Passed, denoised
from cutlayer.model.loss import loss_sum_at
from cutlayer.model.optimizer import gradient_scale
from cutlayer.model.partition import Tail
from cutlayer.privacy.boundary import Boundary
from cutlayer.trace import NoTrace, Tracer
from cutlayer.wire.messages import Backward, Forward, Step
from cutlayer.wire.packed import Packed

__all__ = ["Boundaries", "Pull", "SplitStep", "StepName", "StepSums", "finite"]


@dataclass(frozen=True, kw_only=True)
class Boundaries:
    """The two gates of training."""

    activations: Boundary
    gradients: Boundary


@dataclass(frozen=True, kw_only=True)
class StepName:
    """Which step of which run."""

    run_id: str
    """As the server knows the run."""
    step: int
    """The step that is computed, from 1."""
    weights: str
    """Identifier of the weights that it starts from, unique in the owner's run."""


@dataclass(frozen=True, kw_only=True)
class StepSums:
    """What a step's micro-batches add up to; the gradients are in the parts and in the trunk."""

    loss_sum: float
    num_scored: int
    num_tokens: int
    trunk_sq_norm: float


@dataclass(frozen=True, kw_only=True)
class Pull:
    """FedProx: weight / 2 times the squared distance from these weights is part of the loss."""

    weight: float
    start: Mapping[str, Mapping[str, Tensor]]
    """Adapter states of head and tail, by part."""


@dataclass(kw_only=True)
class _Micro:
    """A micro-batch under way: what its backward will need."""

    number: int
    is_last: bool
    batch: Batch
    kept: Kept
    passed: Passed
    forward: PendingCall
    backward: PendingCall | None = None
    sent_s: float = 0.0


class SplitStep:
    """Computes steps; the commit of one travels with the first forward of the next."""

    def __init__(
        self,
        parts: TrainedParts,
        trunk: RemoteTrunk,
        boundaries: Boundaries,
        in_flight: int,
        tracer: Tracer | None = None,
        observe: Callable[[Tensor, Tensor], None] = lambda h_ND, y_ND: None,
    ) -> None:
        """
        Args:
            parts: head and tail with adapters and optimizers.
            trunk: the server's part.
            boundaries: gates for activations and gradients.
            in_flight: micro-batches under way at once.
            tracer: where the timeline goes.
            observe: shown what the trunk was given and gave back, for drafters that learn from it.
        """
        self._parts = parts
        self._trunk = trunk
        self._boundaries = boundaries
        self._in_flight = in_flight
        self._tracer = tracer or NoTrace()
        self._observe = observe
        self.pending_commit: Step | None = None
        """What the server still has to be told of the last finished step."""

    @property
    def wants_input_grad(self) -> bool:
        """Whether the head trains, so that a gradient at the lower cut is of use."""
        return self._parts.head_trains

    def gradients(self, name: StepName, batches: Sequence[Batch]) -> StepSums:
        """Accumulate a step's gradients: micro-batches flow through, in order, several at once."""
        self._trunk.checks.begin_step(name.step, [chosen.rows for chosen in batches])
        ahead: deque[_Micro] = deque()
        behind: deque[_Micro] = deque()
        loss_sum = sq_norm = 0.0
        for number, chosen in enumerate(batches):
            is_last = number == len(batches) - 1
            ahead.append(self._forward(name, number, chosen, is_last))
            if len(ahead) == self._in_flight:
                loss_sum += self._tail(name, ahead[0])
                behind.append(ahead.popleft())
            if len(behind) == self._in_flight:
                sq_norm = self._head_backward(name, behind.popleft())
        while ahead:
            loss_sum += self._tail(name, ahead[0])
            behind.append(ahead.popleft())
        while behind:
            sq_norm = self._head_backward(name, behind.popleft())
        return StepSums(
            loss_sum=finite(loss_sum, "loss", name.step),
            num_scored=sum(chosen.num_scored for chosen in batches),
            num_tokens=sum(chosen.rows.num_tokens for chosen in batches),
            trunk_sq_norm=sq_norm,
        )

    def finish(
        self,
        name: StepName,
        sums: StepSums,
        lr: float,
        clip_norm: float | None,
        pull: Pull | None = None,
    ) -> StepRecord:
        """Take the step at head and tail; the trunk's follows with the next call."""
        own_sq_norm = self._parts.sq_norm()
        sq_norm = finite(own_sq_norm + sums.trunk_sq_norm, "squared gradient norm", name.step)
        with self._tracer.span("client", "optimizer"):
            scale = gradient_scale(sq_norm, sums.num_scored, clip_norm)
            if pull is None:
                self._parts.step(scale, lr)
            else:
                self._parts.step_towards(scale, lr, pull.start, pull.weight)
        # The trunk wants the norm to clip with; what is of no use there stays here.
        told_sq_norm = 0.0 if clip_norm is None else own_sq_norm
        self.pending_commit = Step(
            step=name.step, client_sq_norm=told_sq_norm, num_tokens=sums.num_scored, lr=lr
        )
        return StepRecord(
            step=name.step,
            loss=sums.loss_sum / max(1, sums.num_scored),
            num_tokens=sums.num_tokens,
            num_scored=sums.num_scored,
            grad_norm=math.sqrt(sq_norm) / max(1, sums.num_scored),
            lr=lr,
        )

    def mean_loss(self, name: StepName, batches: Sequence[Batch]) -> float:
        """Mean loss over rows at the weights of the last finished step, `name.step`."""
        self._parts.set_training(False)
        try:
            sums = [self._loss_of(name, chosen) for chosen in batches]
        finally:
            self._parts.set_training(True)
        loss = math.fsum(s for s, _ in sums) / max(1, sum(n for _, n in sums))
        return finite(loss, "validation loss", name.step)

    def _forward(self, name: StepName, number: int, chosen: Batch, is_last: bool) -> _Micro:
        """Head, gate, up."""
        rows = self._kept(chosen)
        passed, call = self._send_up(name, number, chosen, rows, is_evaluation=False)
        return _Micro(
            number=number,
            is_last=is_last,
            batch=chosen,
            kept=rows,
            passed=passed,
            forward=call,
            sent_s=time.time(),
        )

    def _kept(self, chosen: Batch) -> Kept:
        return kept(chosen, self._boundaries.activations.withholds)

    def _send_up(
        self, name: StepName, number: int, chosen: Batch, rows: Kept, is_evaluation: bool
    ) -> tuple[Passed, PendingCall]:
        self._trunk.checks.require_trust()
        self._parts.seed_dropout(name.step, number)
        with self._tracer.span("client", "head forward", micro=number):
            h_ND = self._parts.head_forward(chosen.rows)
            gate = self._boundaries.activations
            noised_MD, released = gate.release(
                h_ND,
                chosen.rows,
                _row_names(chosen),
                self._weights(name),
                withheld_N=chosen.withheld_N if gate.withholds else None,
            )
        call = Forward(
            run_id=name.run_id,
            step=name.step,
            micro=number,
            lengths=list(rows.rows.lengths),
            commit=self.pending_commit,
            is_evaluation=is_evaluation,
        )
        pending = self._trunk.forward(released, call, self._names(name, chosen))
        # With one call only: that call is repeated until it is answered.
        self.pending_commit = None
        return Passed(h_ND=rows.of(h_ND.detach()), sent_ND=noised_MD), pending

    def _tail(self, name: StepName, micro: _Micro) -> float:
        """Down, tail, loss, gate, gradient up; the summed loss."""
        y_ND = micro.forward.tensor("y")
        self._trunk.checks.forward(_asked(name, micro, micro.forward), y_ND)
        self._observe(micro.passed.sent_ND.detach(), y_ND)
        y_ND.requires_grad_()
        self._note_call("forward call", micro)
        with self._tracer.span("client", "tail", micro=micro.number):
            tail = self._parts.tail
            clean_ND = denoised(tail, y_ND, micro.passed)
            loss_sum = _loss_sum(tail, clean_ND, micro.kept)
            loss_sum.backward()
        assert y_ND.grad is not None
        if self.wants_input_grad or self._parts.trunk_trains:
            micro.backward = self._send_gradient(name, micro, y_ND.grad)
        return float(loss_sum.detach())

    def _send_gradient(self, name: StepName, micro: _Micro, grad_ND: Tensor) -> PendingCall:
        _, released = self._boundaries.gradients.release(
            grad_ND, micro.kept.rows, _row_names(micro.batch), name.weights
        )
        call = Backward(
            run_id=name.run_id, step=name.step, micro=micro.number, is_last=micro.is_last
        )
        micro.sent_s = time.time()
        return self._trunk.backward(released, call, self._names(name, micro.batch))

    def _head_backward(self, name: StepName, micro: _Micro) -> float:
        """Gradient down, head's backward; the trunk's squared norm after the last micro-batch."""
        if micro.backward is None:
            return 0.0
        reply = micro.backward.result()
        self._note_call("backward call", micro)
        if self.wants_input_grad:
            grad_ND = micro.backward.tensor("grad")
            self._trunk.checks.backward(_asked(name, micro, micro.backward), grad_ND)
            with self._tracer.span("client", "head backward", micro=micro.number):
                micro.passed.sent_ND.backward(grad_ND)
        return trunk_sq_norm(reply) if micro.is_last else 0.0

    def _note_call(self, what: str, micro: _Micro) -> None:
        # Two lanes at least: calls in flight overlap.
        lane = f"network {micro.number % self._in_flight}"
        self._tracer.add(lane, what, micro.sent_s, time.time())

    def first_logits(self, name: StepName, chosen: Batch) -> Tensor:
        """Logits [B, V] where each row's first scored token is predicted.

        Raises:
            DataError: a row has no scored token.
        """
        rows = self._kept(chosen)
        self._parts.set_training(False)
        try:
            with torch.no_grad():
                clean_MD = self._returned(name, chosen, rows)
                places_B = rows.first_places()
                logits_BV: Tensor = self._parts.tail(clean_MD, rows.rows, select_N=places_B)
        finally:
            self._parts.set_training(True)
        return logits_BV

    def _loss_of(self, name: StepName, chosen: Batch) -> tuple[float, int]:
        with torch.no_grad():
            rows = self._kept(chosen)
            loss_sum = _loss_sum(self._parts.tail, self._returned(name, chosen, rows), rows)
        return float(loss_sum), len(rows.places_S)

    def _returned(self, name: StepName, chosen: Batch, rows: Kept) -> Tensor:
        """What the trunk makes of rows that are only evaluated, as the tail takes it."""
        passed, call = self._send_up(name, 0, chosen, rows, is_evaluation=True)
        y_MD = call.tensor("y")
        self._trunk.checks.evaluation(name.step, _sent(call), y_MD)
        return denoised(self._parts.tail, y_MD, passed)

    def _weights(self, name: StepName) -> str:
        return name.weights if self.wants_input_grad else "frozen"

    def _names(self, name: StepName, chosen: Batch) -> CallNames:
        below = name.weights if self.wants_input_grad or self._parts.trunk_trains else "frozen"
        return CallNames(rows=_row_names(chosen), weights=name.weights, below=below)


def finite(value: float, name: str, step: int) -> float:
    """The value.

    Raises:
        ConfigError: it is NaN or infinite: training diverged.
    """
    if not math.isfinite(value):
        raise ConfigError(
            f"step {step}: the {name} is {value}, training diverged; nothing was saved since the "
            "last saved step: lower train.lr, or use float32"
        )
    return value


def _asked(name: StepName, micro: _Micro, call: PendingCall) -> TrainingCall:
    return TrainingCall(step=name.step, micro=micro.number, rows=micro.kept.rows, sent=_sent(call))


def _sent(call: PendingCall) -> Packed:
    """As the server has it, rounded by the codec."""
    (sent,) = call.frame.tensors.values()
    return sent


def _loss_sum(tail: Tail, y_MD: Tensor, rows: Kept) -> Tensor:
    return loss_sum_at(tail, y_MD, rows.rows, rows.places_S, rows.targets_S)


def _row_names(chosen: Batch) -> list[str]:
    return [f"row{row_id}" for row_id in chosen.row_ids]
