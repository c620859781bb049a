"""From row ids to logits or losses, and from logits' gradients to what the blocks learn from.

It calls the LM head and keeps what lies between SCORE_ROWS and LEARN_LOGITS; blocks, adapters,
steps and sessions are `server.host`'s. It reads no frames (`connection`).

Shapes: N = tokens of all rows of a call, D = hidden size, S = wanted places, V = vocabulary.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from cutlayer.enclave.inner_part import InnerPart
from cutlayer.enclave.row_store import HeldRow, RowStore
from cutlayer.errors import ProtocolError, StepExpired
from cutlayer.model.rows import Rows
from cutlayer.server.batches import TrunkCall
from cutlayer.server.host import TrunkHost
from cutlayer.wire.enclave_messages import LearnLogits, ScoreRows
from cutlayer.wire.messages import Backward, Forward

__all__ = ["EnclaveDesk", "Scored"]

Key = tuple[str, str]
"""Owner and run id."""

_PIECE_VALUES = 1 << 26
"""Logits that are in memory at once where the loss is computed inside."""


@dataclass(frozen=True, kw_only=True)
class Scored:
    """What became of a micro-batch; each is None where it was not asked for."""

    logits_SV: Tensor | None = field(default=None, repr=False)
    loss_sum: float | None = None
    sq_norm: float | None = None


@dataclass(frozen=True, kw_only=True)
class _Open:
    """A micro-batch whose gradient has not come."""

    normed_SD: Tensor
    places_S: Tensor
    num_tokens: int


@dataclass(kw_only=True)
class _OpenStep:
    step: int
    micros: dict[int, _Open] = field(default_factory=dict)


class EnclaveDesk:
    """All that connections share beside what a trunk server has."""

    def __init__(
        self,
        part: InnerPart,
        host: TrunkHost,
        rows: RowStore,
        max_logits: int = 1 << 28,
        takes_labels: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """
        Args:
            part: blocks, norm and LM head.
            host: has the blocks and the norm as its trunk.
            rows: activations that owners have put.
            max_logits: values that one reply may have; no frame could hold more.
            takes_labels: whether rows may bring their labels.
            clock: seconds.
        """
        self.part, self.host, self.rows, self.clock = part, host, rows, clock
        self.max_logits, self.takes_labels = max_logits, takes_labels
        self._open: dict[Key, _OpenStep] = {}

    def forward_call(self, owner: str, call: ScoreRows, rows: Sequence[HeldRow]) -> TrunkCall:
        """The blocks' share of a micro-batch, to be computed by the host."""
        header = Forward(
            run_id=call.run_id,
            step=call.step,
            micro=call.micro,
            lengths=[len(row.h_LD) for row in rows],
            commit=call.commit,
            is_evaluation=call.is_evaluation,
        )
        h_ND = torch.cat([row.h_LD for row in rows]).float()
        return TrunkCall(owner=owner, header=header, tensor=h_ND)

    def scored(
        self, owner: str, call: ScoreRows, rows: Sequence[HeldRow], normed_ND: Tensor
    ) -> Scored:
        """Logits of the scored places, or their loss; only the runner's thread calls it.

        Raises:
            ProtocolError: the labels did not come with the rows, or values are not finite.
        """
        places_S = _places(rows)
        normed_SD = normed_ND[places_S]
        if call.has_loss_inside:
            return self._loss(owner, call, rows, normed_SD)
        if not call.is_evaluation:
            waiting = _Open(normed_SD=normed_SD, places_S=places_S, num_tokens=len(normed_ND))
            self._step_of(owner, call).micros[call.micro] = waiting
        with torch.no_grad():
            return Scored(logits_SV=self.part.logits(normed_SD))

    def backward_call(self, owner: str, call: LearnLogits, grad_SV: Tensor | None) -> TrunkCall:
        """The blocks' share of a gradient; only the runner's thread calls it.

        Raises:
            StepExpired: the micro-batch is not known; the owner goes back to a common step.
            ProtocolError: the gradient does not fit it, or is not finite.
        """
        known = self._open.get((owner, call.run_id))
        waiting = None
        if known is not None and known.step == call.step:
            waiting = known.micros.get(call.micro)
        if waiting is None:
            raise StepExpired(f"step {call.step} has no micro-batch {call.micro} here; begin again")
        normed_SD = waiting.normed_SD.clone().requires_grad_()
        shape = (len(normed_SD), self.part.vocab_size)
        if (grad_SV is None) != (shape[0] == 0) or (
            grad_SV is not None and tuple(grad_SV.shape) != shape
        ):
            came = None if grad_SV is None else tuple(grad_SV.shape)
            raise ProtocolError(f"gradient of shape {came} for logits of shape {shape}")
        grad_SD = torch.zeros_like(normed_SD)
        if grad_SV is not None:
            # Computed again rather than kept: logits of a whole step are the largest thing here.
            logits_SV = self.part.logits(normed_SD)
            (grad_SD,) = torch.autograd.grad(logits_SV, normed_SD, grad_SV)
        return _backward(owner, call.run_id, call.step, call.micro, call.is_last, waiting, grad_SD)

    def num_tokens(self, owner: str, call: LearnLogits) -> int:
        """Tokens behind a gradient, as far as is known; any thread may ask."""
        known = self._open.get((owner, call.run_id))
        waiting = None if known is None else known.micros.get(call.micro)
        return 1 if waiting is None else waiting.num_tokens

    def logits_of(
        self, normed_ND: Tensor, lengths: Sequence[int], wanted: Sequence[int]
    ) -> Tensor | None:
        """Logits after the last `wanted` tokens of each row; None where none are."""
        ends = Rows(lengths=tuple(lengths)).offsets[1:]
        pairs = zip(ends, wanted, strict=True)
        places = [place for end, number in pairs for place in range(end - number, end)]
        if not places:
            return None
        with torch.inference_mode():
            return self.part.logits(normed_ND[torch.tensor(places)])

    def _loss(
        self, owner: str, call: ScoreRows, rows: Sequence[HeldRow], normed_SD: Tensor
    ) -> Scored:
        targets_S, loss_sum, grads = _targets(rows), 0.0, []
        # Piece by piece: the logits of all places together may be larger than the blocks.
        num_places = max(1, _PIECE_VALUES // self.part.vocab_size)
        pieces = zip(normed_SD.split(num_places), targets_S.split(num_places), strict=True)
        for piece_SD, targets in pieces if len(targets_S) else ():
            loss, grad_SD = self._piece_loss(piece_SD, targets, wants_grad=not call.is_evaluation)
            loss_sum += loss
            grads.append(grad_SD)
        if call.is_evaluation:
            return Scored(loss_sum=loss_sum)
        grad_SD = torch.cat(grads) if grads else torch.zeros_like(normed_SD)
        num_tokens = sum(len(row.h_LD) for row in rows)
        here = _Open(normed_SD=normed_SD, places_S=_places(rows), num_tokens=num_tokens)
        back = _backward(owner, call.run_id, call.step, call.micro, call.is_last, here, grad_SD)
        assert isinstance(back.header, Backward)
        _, sq_norm = self.host.backward(owner, back.header, back.tensor)
        return Scored(loss_sum=loss_sum, sq_norm=sq_norm)

    def _piece_loss(
        self, normed_SD: Tensor, targets_S: Tensor, wants_grad: bool
    ) -> tuple[float, Tensor]:
        """Summed loss of some places, and its gradient at them; zero where it is not wanted."""
        normed_SD = normed_SD.clone().requires_grad_(wants_grad)
        with torch.set_grad_enabled(wants_grad):
            logits_SV = self.part.logits(normed_SD)
            loss_sum = nn.functional.cross_entropy(logits_SV, targets_S, reduction="sum")
        if not wants_grad:
            return float(loss_sum), torch.zeros_like(normed_SD)
        (grad_SD,) = torch.autograd.grad(loss_sum, normed_SD)
        return float(loss_sum.detach()), grad_SD

    def _step_of(self, owner: str, call: ScoreRows) -> _OpenStep:
        alive = {(one, run_id) for one, run_id, _ in self.host.runs()}
        self._open = {key: step for key, step in self._open.items() if key in alive}
        key = (owner, call.run_id)
        if key not in self._open or self._open[key].step != call.step:
            self._open[key] = _OpenStep(step=call.step)
        return self._open[key]


def _backward(
    owner: str, run_id: str, step: int, micro: int, is_last: bool, waiting: _Open, grad_SD: Tensor
) -> TrunkCall:
    """The gradient at the normed states: zero but at the scored places."""
    grad_ND = grad_SD.new_zeros(waiting.num_tokens, grad_SD.shape[1])
    grad_ND[waiting.places_S] = grad_SD
    header = Backward(run_id=run_id, step=step, micro=micro, is_last=is_last)
    return TrunkCall(owner=owner, header=header, tensor=grad_ND)


def _places(rows: Sequence[HeldRow]) -> Tensor:
    """Scored places [S] in the packed order."""
    offsets = Rows(lengths=tuple(len(row.h_LD) for row in rows)).offsets
    places = [
        begin + place for begin, row in zip(offsets, rows, strict=False) for place in row.places
    ]
    return torch.tensor(places, dtype=torch.int64)


def _targets(rows: Sequence[HeldRow]) -> Tensor:
    if any(row.targets is None for row in rows):
        raise ProtocolError(
            "the loss is asked for, but the labels did not come with these rows; put them again "
            'with enclave.labels = "enclave", or keep labels = "client"'
        )
    return torch.tensor([t for row in rows for t in row.targets or ()], dtype=torch.int64)
