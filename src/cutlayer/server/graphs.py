"""Autograd graphs of the trunk between FORWARD and BACKWARD, within a byte budget.

A graph that does not fit is dropped and its forward recomputed at BACKWARD: the same numbers,
because dropout is seeded per micro-batch. It does not know runs, steps or clients.
"""

import torch
from torch import Tensor

from cutlayer.errors import ProtocolError
from cutlayer.model.partition import Trunk
from cutlayer.model.rows import Rows

__all__ = ["Graph", "GraphBudget"]


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
    """One micro-batch's way through the trunk, kept or recomputed."""

    def __init__(
        self, trunk: Trunk, h_ND: Tensor, rows: Rows, seed: int, wants_input_grad: bool
    ) -> None:
        self._trunk = trunk
        self._h_ND = h_ND.detach().requires_grad_(wants_input_grad)
        self._rows = rows
        self._seed = seed
        self._y_ND: Tensor | None = None
        self._held_bytes = 0

    def forward(self, budget: GraphBudget) -> Tensor:
        """Trunk output [N, D], detached; the graph stays if the budget has room for it."""
        y_ND, num_bytes = self._run()
        if y_ND.requires_grad and budget.take(num_bytes):
            self._y_ND, self._held_bytes = y_ND, num_bytes
        return y_ND.detach()

    def backward(self, grad_ND: Tensor, budget: GraphBudget) -> Tensor | None:
        """Accumulate the adapter's gradients; the gradient of the input if it is wanted.

        Raises:
            ProtocolError: the gradient's shape is not the output's.
        """
        if grad_ND.shape != self._h_ND.shape:
            raise ProtocolError(
                f"gradient of shape {tuple(grad_ND.shape)} for a micro-batch of shape "
                f"{tuple(self._h_ND.shape)}"
            )
        y_ND = self._run()[0] if self._y_ND is None else self._y_ND
        if y_ND.requires_grad:
            y_ND.backward(grad_ND.to(y_ND.dtype))
        grad_in_ND = self._h_ND.grad
        self.drop(budget)
        return grad_in_ND

    def drop(self, budget: GraphBudget) -> None:
        """Free the activations."""
        budget.give_back(self._held_bytes)
        self._y_ND, self._held_bytes = None, 0
        self._h_ND.grad = None

    def _run(self) -> tuple[Tensor, int]:
        counter = _SavedBytes()
        torch.manual_seed(self._seed)
        with torch.autograd.graph.saved_tensors_hooks(counter.pack, _unpack):
            self._trunk.train()
            try:
                y_ND = self._trunk(self._h_ND, self._rows)
            finally:
                self._trunk.eval()
        return y_ND, counter.num_bytes


class _SavedBytes:
    """Counts the distinct storages that autograd saves, weights included only by reference."""

    def __init__(self) -> None:
        self.num_bytes = 0
        self._seen: set[int] = set()

    def pack(self, saved: Tensor) -> Tensor:
        is_weight = saved.is_leaf or (saved._base is not None and saved._base.is_leaf)
        pointer = saved.untyped_storage().data_ptr()
        if not is_weight and pointer not in self._seen:
            self._seen.add(pointer)
            self.num_bytes += saved.untyped_storage().nbytes()
        return saved


def _unpack(saved: Tensor) -> Tensor:
    return saved
