"""Training calls that go from hop to hop: each reply is checked and passes the next hop's gate.

It does not open or save runs (`chain_trunk`). A call moves on while it or another one is waited
for (`chain_flow`); calls reach every hop in the order in which they were sent.

Shapes: N = tokens of all rows of a micro-batch, D = hidden size.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass

import msgspec
from torch import Tensor

from cutlayer.client.attested import Attestation
from cutlayer.client.chain_flow import CallFlow
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
    max_session_vectors: int | None = None
    """Vectors that one conversation may release to it."""
    proof: Attestation | None = None
    """Of a hop after the first: what it must prove."""


class _ChainCall(PendingCall, ABC):
    """What both directions have in common; implements `chain_flow.Moving`."""

    def __init__(
        self, route: Sequence[ChainHop], rows: Rows, first: PendingCall, flow: CallFlow
    ) -> None:
        """
        Args:
            route: the hops in the order in which they are met.
            rows: layout of what was sent.
            first: the call of the first of them.
            flow: moves the others while this one is waited for.
        """
        self._route, self._rows, self._flow = tuple(route), rows, flow
        self._call = first
        self.place = 0
        self.frame = first.frame
        flow.add(self)

    @property
    @abstractmethod
    def direction(self) -> str:
        """See `chain_flow.Moving`."""

    @property
    def is_at_end(self) -> bool:
        """See `chain_flow.Moving`."""
        return self.place == len(self._route) - 1

    @property
    def under_way(self) -> "Future[Frame]":
        """See `chain_flow.Moving`."""
        return self._call.future

    def move_on(self) -> None:
        """See `chain_flow.Moving`."""
        self._call = self._sent_on(self._route[self.place + 1])
        self.place += 1

    def result(self) -> Frame:
        """See `PendingCall.result`."""
        try:
            while not self.is_at_end:
                self._flow.wait_for(self)
                # Whoever waits repeats what a lost connection took.
                self._call.result()
                if not self.is_at_end:
                    self.move_on()
            self._flow.wait_for(self)
            return self._ended(self._call.result())
        finally:
            self._flow.drop(self)

    def tensor(self, name: str) -> Tensor:
        """See `PendingCall.tensor`."""
        self.result()
        return self._checked()

    def forget(self) -> None:
        """See `PendingCall.forget`."""
        self._flow.drop(self)
        self._call.forget()

    @abstractmethod
    def _checked(self) -> Tensor:
        """What the hop returned that has the call, checked."""

    @abstractmethod
    def _sent_on(self, hop: ChainHop) -> PendingCall:
        """The call to the next hop, with what follows from the reply."""

    def _ended(self, reply: Frame) -> Frame:
        """The last hop's reply, as that of all."""
        return reply

    def _training_call(self, header: Forward | Backward) -> TrainingCall:
        (sent,) = self._call.frame.tensors.values()
        return TrainingCall(step=header.step, micro=header.micro, rows=self._rows, sent=sent)

    @property
    def _hop(self) -> ChainHop:
        return self._route[self.place]


class ChainForward(_ChainCall):
    """Up through all hops; the reply's tensor `y` is the last one's."""

    direction = "up"

    def __init__(
        self,
        route: Sequence[ChainHop],
        released: Released,
        calls: Sequence[Forward],
        names: CallNames,
        flow: CallFlow,
    ) -> None:
        """
        Args:
            route: hops, the lowest first.
            released: what the first is given.
            calls: what each is told.
            names: of the rows, for the gates on the way.
            flow: of all calls under way.
        """
        first = route[0].trunk.forward(released, calls[0])
        super().__init__(route, released.rows, first, flow)
        self._calls, self._names = tuple(calls), names

    def _sent_on(self, hop: ChainHop) -> PendingCall:
        names = self._names
        _, released = hop.training.activations.release(
            self._checked(), self._rows, names.rows, names.below
        )
        return hop.trunk.forward(released, self._calls[self.place + 1])

    def _checked(self) -> Tensor:
        y_ND, header = self._call.tensor("y"), self._calls[self.place]
        checks = self._hop.trunk.checks
        if header.is_evaluation:
            (sent,) = self._call.frame.tensors.values()
            checks.evaluation(header.step, sent, y_ND)
        else:
            checks.forward(self._training_call(header), y_ND)
        return y_ND


class ChainBackward(_ChainCall):
    """Down through all hops; the reply's tensor `grad` is the first one's, the norm all hops'."""

    direction = "down"

    def __init__(
        self,
        hops: Sequence[ChainHop],
        released: Released,
        header: Backward,
        names: CallNames,
        flow: CallFlow,
        note: Callable[[int, Sequence[float]], None],
    ) -> None:
        """
        Args:
            hops: the lowest first.
            released: what the last is given.
            header: what each is told.
            names: of the rows, for the gates on the way.
            flow: of all calls under way.
            note: told the step and each hop's squared norm, after its last micro-batch.
        """
        route = list(reversed(hops))
        first = route[0].trunk.backward(released, header)
        super().__init__(route, released.rows, first, flow)
        self._header, self._names, self._note = header, names, note
        self._sq_norms: list[float] = []

    def _sent_on(self, hop: ChainHop) -> PendingCall:
        self._take_norm(self._call.result())
        names = self._names
        _, released = hop.training.gradients.release(
            self._checked(), self._rows, names.rows, names.weights
        )
        return hop.trunk.backward(released, self._header)

    def _ended(self, reply: Frame) -> Frame:
        if len(self._sq_norms) < len(self._route):
            self._take_norm(reply)
        total = sum(self._sq_norms) if self._header.is_last else None
        told = msgspec.structs.replace(header_of(reply, BackwardDone), trunk_sq_norm=total)
        return Frame(kind=reply.kind, header=told, tensors=reply.tensors)

    def _checked(self) -> Tensor:
        grad_ND = self._call.tensor("grad")
        self._hop.trunk.checks.backward(self._training_call(self._header), grad_ND)
        return grad_ND

    def _take_norm(self, reply: Frame) -> None:
        if not self._header.is_last:
            return
        self._sq_norms.insert(0, trunk_sq_norm(reply, self._hop.trunk.checks.peer))
        if len(self._sq_norms) == len(self._route):
            self._note(self._header.step, self._sq_norms)
