"""Training calls that go from hop to hop: each reply is checked and passes the next hop's gate.

It does not open or save runs (`chain_trunk`). A call moves on when somebody waits for it, so calls
reach every hop in the order in which they were sent.

Shapes: N = tokens of all rows of a micro-batch, D = hidden size.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import msgspec
from torch import Tensor

from cutlayer.client.attested import Attestation
from cutlayer.client.link import PendingCall, header_of
from cutlayer.client.remote_trunk import CallNames, RemoteTrunk, trunk_sq_norm
from cutlayer.client.returned import TrainingCall
from cutlayer.client.step import Boundaries
from cutlayer.model.rows import Rows
from cutlayer.privacy.boundary import Boundary, Released
from cutlayer.wire.frame import Frame
from cutlayer.wire.messages import Backward, BackwardDone, Forward

__all__ = ["ChainBackward", "ChainForward", "ChainHop"]


@dataclass(frozen=True, kw_only=True)
class ChainHop:
    """One trunk of a chain, and the gates in front of it."""

    trunk: RemoteTrunk
    training: Boundaries
    generation: Boundary
    proof: Attestation | None = None
    """Of a hop after the first: what it must prove."""


class _ChainCall(PendingCall):
    """What both directions have in common."""

    def __init__(self, route: Sequence[ChainHop], rows: Rows, first: PendingCall) -> None:
        """
        Args:
            route: the hops in the order in which they are met.
            rows: layout of what was sent.
            first: the call of the first of them.
        """
        self._route, self._rows = tuple(route), rows
        self._place, self._call = 0, first
        self._is_checked = False
        self.frame = first.frame

    def forget(self) -> None:
        """See `PendingCall.forget`."""
        self._call.forget()

    def _training_call(self, header: Forward | Backward) -> TrainingCall:
        (sent,) = self._call.frame.tensors.values()
        return TrainingCall(step=header.step, micro=header.micro, rows=self._rows, sent=sent)

    @property
    def _hop(self) -> ChainHop:
        return self._route[self._place]

    @property
    def _is_at_end(self) -> bool:
        return self._place == len(self._route) - 1


class ChainForward(_ChainCall):
    """Up through all hops; the reply's tensor `y` is the last one's."""

    def __init__(
        self,
        route: Sequence[ChainHop],
        released: Released,
        calls: Sequence[Forward],
        names: CallNames,
    ) -> None:
        """
        Args:
            route: hops, the lowest first.
            released: what the first is given.
            calls: what each is told.
            names: of the rows, for the gates on the way.
        """
        super().__init__(route, released.rows, route[0].trunk.forward(released, calls[0]))
        self._calls, self._names = tuple(calls), names

    def result(self) -> Frame:
        """See `PendingCall.result`."""
        while not self._is_at_end:
            y_ND = self._checked()
            self._place += 1
            gate = self._hop.training.activations
            names = self._names
            _, released = gate.release(y_ND, self._rows, names.rows, names.weights)
            self._call = self._hop.trunk.forward(released, self._calls[self._place])
        return self._call.result()

    def tensor(self, name: str) -> Tensor:
        """See `PendingCall.tensor`."""
        self.result()
        return self._checked()

    def _checked(self) -> Tensor:
        y_ND, header = self._call.tensor("y"), self._calls[self._place]
        checks = self._hop.trunk.checks
        if header.is_evaluation:
            (sent,) = self._call.frame.tensors.values()
            checks.evaluation(header.step, sent, y_ND)
        else:
            checks.forward(self._training_call(header), y_ND)
        return y_ND


class ChainBackward(_ChainCall):
    """Down through all hops; the reply's tensor `grad` is the first one's, the norm all hops'."""

    def __init__(
        self,
        hops: Sequence[ChainHop],
        released: Released,
        header: Backward,
        names: CallNames,
        note: Callable[[int, Sequence[float]], None],
    ) -> None:
        """
        Args:
            hops: the lowest first.
            released: what the last is given.
            header: what each is told.
            names: of the rows, for the gates on the way.
            note: told the step and each hop's squared norm, after its last micro-batch.
        """
        route = list(reversed(hops))
        super().__init__(route, released.rows, route[0].trunk.backward(released, header))
        self._header, self._names, self._note = header, names, note
        self._sq_norms: list[float] = []

    def result(self) -> Frame:
        """See `PendingCall.result`."""
        while not self._is_at_end:
            self._take_norm(self._call.result())
            grad_ND = self._checked()
            self._place += 1
            gate, names = self._hop.training.gradients, self._names
            _, released = gate.release(grad_ND, self._rows, names.rows, names.weights)
            self._call = self._hop.trunk.backward(released, self._header)
        reply = self._call.result()
        if len(self._sq_norms) < len(self._route):
            self._take_norm(reply)
        total = sum(self._sq_norms) if self._header.is_last else None
        told = msgspec.structs.replace(header_of(reply, BackwardDone), trunk_sq_norm=total)
        return Frame(kind=reply.kind, header=told, tensors=reply.tensors)

    def tensor(self, name: str) -> Tensor:
        """See `PendingCall.tensor`."""
        self.result()
        return self._checked()

    def _checked(self) -> Tensor:
        grad_ND = self._call.tensor("grad")
        self._hop.trunk.checks.backward(self._training_call(self._header), grad_ND)
        return grad_ND

    def _take_norm(self, reply: Frame) -> None:
        if not self._header.is_last:
            return
        self._sq_norms.insert(0, trunk_sq_norm(reply))
        if len(self._sq_norms) == len(self._route):
            self._note(self._header.step, self._sq_norms)
