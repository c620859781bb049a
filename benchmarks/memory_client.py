"""The measured client process of `benchmarks.memory`: load head and tail, one step, report.

Peak resident set is VmHWM of this process alone: `ru_maxrss` would inherit the parent's. It does
not compare.
"""

from collections.abc import Iterable
from pathlib import Path

import msgspec
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from benchmarks.isolate import answer, read_request
from cutlayer.model.adapters import AdapterSettings, attach
from cutlayer.model.checkpoint import load_client_parts
from cutlayer.model.folder import resolve_model
from cutlayer.model.loss import completion_loss_sum
from cutlayer.model.partition import Cut, Head, Tail
from cutlayer.model.rows import pack

__all__ = ["MemoryRequest", "MemoryUse", "SavedBytes", "main", "peak_resident_bytes"]


class MemoryRequest(msgspec.Struct, frozen=True, kw_only=True):
    """What the process loads and runs."""

    model_folder: str
    lower: int
    upper: int
    dtype: str
    num_tokens: int = 128
    is_empty: bool = False
    """Import everything, load nothing: what the libraries alone cost."""


class MemoryUse(msgspec.Struct, frozen=True, kw_only=True):
    """What it needed, in bytes."""

    peak_bytes: int
    """Peak resident set of the whole process."""
    loaded_peak_bytes: int = 0
    """The same when the parts were loaded and nothing had run."""
    tensor_bytes: int = 0
    """Weights, buffers and adapters of head and tail, and the adapters' gradients."""
    activation_bytes: int = 0
    """What autograd kept for the backward pass, weights excluded, each storage once."""


class SavedBytes:
    """Counts the storages that autograd saves; the owner's weights are not activations.

    Args:
        weights: tensors whose storages do not count.
    """

    def __init__(self, weights: Iterable[Tensor]) -> None:
        self._weights = {weight.untyped_storage().data_ptr() for weight in weights}
        self._storages: dict[int, int] = {}

    @property
    def total(self) -> int:
        """Bytes of all storages seen."""
        return sum(self._storages.values())

    def hooks(self) -> saved_tensors_hooks:
        """The context in which to run the forward pass."""
        return saved_tensors_hooks(self._see, lambda tensor: tensor)

    def _see(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._weights:
            self._storages[storage.data_ptr()] = storage.nbytes()
        return tensor


def peak_resident_bytes() -> int:
    """VmHWM of this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("/proc/self/status has no VmHWM; this benchmark needs Linux")


def _tensors(parts: Iterable[nn.Module]) -> list[Tensor]:
    return [tensor for part in parts for tensor in (*part.parameters(), *part.buffers())]


def _owned_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the tensors' storages, a shared one once, and of their gradients."""
    storages: dict[int, int] = {}
    for tensor in tensors:
        for one in (tensor, tensor.grad):
            if one is not None:
                storages[one.untyped_storage().data_ptr()] = one.untyped_storage().nbytes()
    return sum(storages.values())


def _step(head: Head, tail: Tail, num_tokens: int) -> int:
    """Forward and backward of one row through both parts, the trunk an echo; activation bytes."""
    rows = pack([[1 + index % 1000 for index in range(num_tokens)]])
    saved = SavedBytes(_tensors((head, tail)))
    with saved.hooks():
        h_ND = head(rows)
        y_ND = h_ND.detach().requires_grad_()
        assert rows.tokens_N is not None
        loss_sum, _ = completion_loss_sum(tail, y_ND, rows, rows.tokens_N)
    torch.autograd.backward(loss_sum)
    torch.autograd.backward(h_ND, y_ND.grad)
    return saved.total


def _measure(request: MemoryRequest) -> MemoryUse:
    if request.is_empty:
        return MemoryUse(peak_bytes=peak_resident_bytes())
    cut = Cut(request.lower, request.upper)
    head, tail = load_client_parts(
        resolve_model(request.model_folder), cut, dtype=request.dtype, device="cpu"
    )
    for part in (head, tail):
        attach(part, AdapterSettings())
    loaded_peak_bytes = peak_resident_bytes()
    activation_bytes = _step(head, tail, request.num_tokens)
    return MemoryUse(
        peak_bytes=peak_resident_bytes(),
        loaded_peak_bytes=loaded_peak_bytes,
        tensor_bytes=_owned_bytes(_tensors((head, tail))),
        activation_bytes=activation_bytes,
    )


def main() -> None:
    """Answer one `MemoryRequest` from stdin."""
    answer(_measure(read_request(MemoryRequest)))


if __name__ == "__main__":
    main()
