"""Autograd graphs of the trunk between FORWARD and BACKWARD, within a byte budget.

One joint graph may hold micro-batches of several clients. What does not fit, or was used up by the
others, is dropped, and its forward recomputed at BACKWARD: the same numbers, because dropout is
seeded per micro-batch. It does not compute (`engine`) nor know runs, steps or scheduling.

Shapes: N = tokens of a micro-batch, D = hidden size.
"""

import itertools
from collections.abc import Sequence

from torch import Tensor

from cutlayer.model.adapters import Adapter
from cutlayer.model.rows import Rows

__all__ = ["Graph", "GraphBudget", "JointGraph"]

_numbers = itertools.count()


class GraphBudget:
    """Bytes of activations that waiting graphs may hold together."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.used_bytes = 0

    def take(self, num_bytes: int) -> bool:
        """Reserve, or say that there is no room."""
        if self.used_bytes + num_bytes > self.max_bytes:
            return False
        self.used_bytes += num_bytes
        return True

    def give_back(self, num_bytes: int) -> None:
        """Return what `take` reserved."""
        self.used_bytes -= num_bytes


class Graph:
    """One micro-batch of one client, and the joint graph that holds its activations.

    Attributes:
        joint: None before the forward, and when the activations are gone.
    """

    def __init__(
        self,
        owner: str,
        adapter: Adapter,
        h_ND: Tensor,
        rows: Rows,
        blocks: range,
        seed: int,
        wants_grad: bool,
    ) -> None:
        """Args:
        owner: the client's name.
        adapter: the weights that learn from it.
        h_ND: released hidden states [N, D].
        rows: their layout.
        blocks: global indices of the blocks that they take.
        seed: of the dropout's places.
        wants_grad: whether the input's gradient will be asked for.
        """
        self.owner = owner
        self.adapter = adapter
        # Kept, because an adapter that was removed has none.
        self.weights = adapter.parameters()
        self.h_ND = h_ND.detach().requires_grad_(wants_grad)
        self.rows = rows
        self.blocks = blocks
        self.seed = seed
        self.joint: JointGraph | None = None

    def drop(self) -> None:
        """Nobody will ask for this micro-batch's backward any more."""
        if self.joint is not None:
            self.joint.forget([self])


class JointGraph:
    """The activations of one trunk call, until every member was used or forgotten.

    Attributes:
        number: a name of its own, for the scheduler.
        members: all micro-batches in the order of their rows.
        waiting: those whose BACKWARD has not come.
        y_ND: the call's output with its graph; None when dropped.
    """

    def __init__(
        self, members: Sequence[Graph], y_ND: Tensor, num_bytes: int, budget: GraphBudget
    ) -> None:
        """Keep the activations if the budget has room; else only who was together."""
        self.number = next(_numbers)
        self.members = list(members)
        self.waiting = list(members)
        self._budget = budget
        self._held_bytes = 0
        self.y_ND: Tensor | None = None
        if y_ND.requires_grad and budget.take(num_bytes):
            self.y_ND, self._held_bytes = y_ND, num_bytes
        for member in members:
            member.joint = self

    def forget(self, members: Sequence[Graph]) -> None:
        """These members are done or gone; free the activations after the last."""
        for member in members:
            self.waiting.remove(member)
            member.joint = None
        if not self.waiting:
            self._free()

    def use_up(self) -> None:
        """Its activations served one backward; members who missed it are on their own."""
        self.forget(list(self.waiting))

    def _free(self) -> None:
        self._budget.give_back(self._held_bytes)
        self.y_ND, self._held_bytes = None, 0
