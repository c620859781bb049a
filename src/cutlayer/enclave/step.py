"""One optimizer step of an owner whose later blocks are in an enclave: rows named, losses here.

It does not choose rows, save, open runs or decide what follows (`client.train`, `client.member`),
and nothing leaves but through the gates. With labels at the owner the loss is computed here.

Shapes: S = scored places of a micro-batch, V = vocabulary, B = rows.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from cutlayer.client.link import PendingCall
from cutlayer.client.parts import TrainedParts
from cutlayer.client.step import Boundaries, SplitStep, StepName, StepSums, finite
from cutlayer.data.batches import Batch
from cutlayer.enclave.feeding import RowFeeder, num_places, row_names
from cutlayer.enclave.remote import LogitsCall, RemoteEnclave, learnt_sq_norm
from cutlayer.errors import DataError, ProtocolError, SessionLost
from cutlayer.model.loss import scored_places
from cutlayer.model.rows import Rows
from cutlayer.trace import Tracer
from cutlayer.wire.enclave_messages import LearnLogits, RowsScored, ScoreRows
from cutlayer.wire.messages import Step

__all__ = ["EnclaveStep"]

_MAX_LOST = 3
"""How often the enclave may lose the rows of one step."""


@dataclass(kw_only=True)
class _Micro:
    """A micro-batch under way."""

    number: int
    is_last: bool
    batch: Batch
    score: LogitsCall
    learn: PendingCall | None = None

    def forget(self) -> None:
        """Nobody waits for it any more."""
        self.score.forget()
        if self.learn is not None:
            self.learn.forget()


class EnclaveStep(SplitStep):
    """Computes steps; the commit of one travels with the first rows of the next."""

    def __init__(
        self,
        parts: TrainedParts,
        enclave: RemoteEnclave,
        gates: Boundaries,
        feeder: RowFeeder,
        in_flight: int,
        tracer: Tracer | None = None,
    ) -> None:
        """
        Args:
            parts: the owner's, of which nothing trains.
            enclave: everything else.
            gates: for activations and for gradients at the logits.
            feeder: sends rows that are not there; it knows where labels are.
            in_flight: micro-batches under way at once.
            tracer: where the timeline goes.
        """
        super().__init__(parts, enclave, gates, in_flight, tracer)
        self._enclave, self._feeder = enclave, feeder

    def gradients(self, name: StepName, batches: Sequence[Batch]) -> StepSums:
        """Accumulate a step's gradients inside; rows that are lost on the way are sent again.

        Raises:
            SessionLost: the enclave lost rows again and again.
            StepExpired: the enclave is at another step.
        """
        commit = self.pending_commit
        for attempt in range(1, _MAX_LOST + 1):
            try:
                return self._once(name, batches)
            except SessionLost:
                if attempt == _MAX_LOST:
                    raise
                # What was learnt of the step counts once, however often it is sent.
                self._feeder.forget_all()
                self.pending_commit = commit
        raise AssertionError

    def first_logits(self, name: StepName, chosen: Batch) -> Tensor:
        """Logits [B, V] where each row's first scored token is predicted.

        Raises:
            DataError: a row has no scored token.
        """
        counts = num_places(chosen)
        if not all(counts):
            raise DataError("a row has no scored token; every row needs an answer")
        logits_SV = self._evaluated(name, chosen, has_loss_inside=False).tensor("logits")
        firsts = [sum(counts[:row]) for row in range(len(counts))]
        return logits_SV[torch.tensor(firsts)]

    def _once(self, name: StepName, batches: Sequence[Batch]) -> StepSums:
        self._feeder.ensure(batches)
        ahead: deque[_Micro] = deque()
        behind: deque[_Micro] = deque()
        loss_sum = sq_norm = 0.0
        try:
            for number, chosen in enumerate(batches):
                ahead.append(self._send(name, number, chosen, number == len(batches) - 1))
                while len(ahead) >= self._in_flight or (ahead and ahead[-1].is_last):
                    loss_sum += self._take(name, ahead[0])
                    behind.append(ahead.popleft())
                while behind and (len(behind) >= self._in_flight or behind[-1].is_last):
                    sq_norm = self._end(behind.popleft())
        except BaseException:
            for micro in (*ahead, *behind):
                micro.forget()
            raise
        return StepSums(
            loss_sum=finite(loss_sum, "loss", name.step),
            num_scored=sum(chosen.num_scored for chosen in batches),
            num_tokens=sum(chosen.rows.num_tokens for chosen in batches),
            trunk_sq_norm=sq_norm,
        )

    def _send(self, name: StepName, number: int, chosen: Batch, is_last: bool) -> _Micro:
        score = self._score(name, number, chosen, is_last=is_last, commit=self.pending_commit)
        # With one call only: that call is repeated until it is answered.
        self.pending_commit = None
        return _Micro(number=number, is_last=is_last, batch=chosen, score=score)

    def _score(
        self,
        name: StepName,
        number: int,
        chosen: Batch,
        *,
        commit: Step | None,
        is_last: bool = False,
        is_evaluation: bool = False,
        has_loss_inside: bool | None = None,
    ) -> LogitsCall:
        rows, is_inside = self._feeder.name, self._feeder.sends_labels
        call = ScoreRows(
            run_id=name.run_id,
            step=name.step,
            micro=number,
            row_set=rows.row_set,
            front=rows.front,
            row_ids=list(chosen.row_ids),
            is_last=is_last,
            commit=commit,
            is_evaluation=is_evaluation,
            has_loss_inside=is_inside if has_loss_inside is None else has_loss_inside,
        )
        return self._enclave.score(call, sum(num_places(chosen)))

    def _take(self, name: StepName, micro: _Micro) -> float:
        """The summed loss of a micro-batch; its gradient is on its way."""
        if self._feeder.sends_labels:
            return _told_loss(micro.score)
        logits_SV = micro.score.tensor("logits").requires_grad_()
        with self._tracer.span("client", "loss", micro=micro.number):
            loss_sum = _loss_sum(logits_SV, micro.batch)
            loss_sum.backward()
        micro.learn = self._learn(name, micro, logits_SV.grad)
        return float(loss_sum.detach())

    def _learn(self, name: StepName, micro: _Micro, grad_SV: Tensor | None) -> PendingCall:
        call = LearnLogits(
            run_id=name.run_id, step=name.step, micro=micro.number, is_last=micro.is_last
        )
        counts = num_places(micro.batch)
        if not sum(counts):
            return self._enclave.learn(None, call)
        assert grad_SV is not None
        # One vector per scored place; a row without any sends none.
        scored = [(row, n) for row, n in zip(micro.batch.row_ids, counts, strict=True) if n]
        layout = Rows(lengths=tuple(n for _, n in scored))
        names = row_names(row for row, _ in scored)
        _, released = self._boundaries.gradients.release(grad_SV, layout, names, name.weights)
        return self._enclave.learn(released, call)

    def _end(self, micro: _Micro) -> float:
        """The squared norm, after the last micro-batch."""
        last = micro.score if micro.learn is None else micro.learn
        reply = last.result()
        return learnt_sq_norm(reply) if micro.is_last else 0.0

    def _evaluated(
        self, name: StepName, chosen: Batch, has_loss_inside: bool | None = None
    ) -> LogitsCall:
        """A call that has been answered."""
        for attempt in range(1, _MAX_LOST + 1):
            self._feeder.ensure([chosen])
            call = self._score(
                name,
                0,
                chosen,
                commit=self.pending_commit,
                is_evaluation=True,
                has_loss_inside=has_loss_inside,
            )
            try:
                call.result()
            except SessionLost:
                if attempt == _MAX_LOST:
                    raise
                self._feeder.forget_all()
                continue
            self.pending_commit = None
            return call
        raise AssertionError

    def _loss_of(self, name: StepName, chosen: Batch) -> tuple[float, int]:
        call = self._evaluated(name, chosen)
        if self._feeder.sends_labels:
            return _told_loss(call), chosen.num_scored
        with torch.no_grad():
            return float(_loss_sum(call.tensor("logits"), chosen)), chosen.num_scored


def _told_loss(call: LogitsCall) -> float:
    header = call.result().header
    if not isinstance(header, RowsScored) or header.loss_sum is None:
        raise ProtocolError("the enclave was given labels and told no loss")
    return header.loss_sum


def _loss_sum(logits_SV: Tensor, chosen: Batch) -> Tensor:
    _, targets_S = scored_places(chosen.rows, chosen.labels_N)
    if not len(targets_S):
        return logits_SV.sum() * 0.0
    return nn.functional.cross_entropy(logits_SV, targets_S, reduction="sum")
