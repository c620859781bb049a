"""What the ranks of one sharded model say to each other, and its place in autograd.

It does not know layers or plans (`tensor_parallel`) nor what a leader asks for
(`server.tensor_parallel`). Tensors and flat bytes travel, never objects.

Megatron's pair (Shoeybi et al., arXiv 1909.08053, section 3): where a whole tensor enters sharded
weights, gradients are summed over ranks; where partial sums leave them, values are.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import FunctionCtx

from cutlayer.errors import ConfigError, TransportError

__all__ = [
    "Ranks",
    "gather_columns",
    "join_ranks",
    "own_columns",
    "own_device",
    "sum_gradient",
    "sum_values",
]

_PATIENT = timedelta(days=365)
"""How long a follower waits for the next command; a leader that ends closes the connection."""
_FIRST_BYTES = 8192
"""Of a message in its first broadcast; most are shorter."""
_LENGTH_BYTES = 8


class Ranks:
    """The processes that share one model, seen from one of them."""

    def __init__(
        self,
        rank: int,
        size: int,
        control: dist.ProcessGroup | None = None,
        meeting: dist.ProcessGroup | None = None,
    ) -> None:
        """
        Args:
            rank: this process; 0 leads.
            size: how many there are.
            control: all of them on the CPU; followers have patience there.
            meeting: all of them on the CPU; everybody has patience there.
        """
        self.rank = rank
        self.size = size
        self._control = control
        self._meeting = meeting
        self._lost: str | None = None
        self._when_lost: list[Callable[[str], None]] = []

    @property
    def is_leader(self) -> bool:
        """Whether this process serves."""
        return self.rank == 0

    def when_lost(self, callback: Callable[[str], None]) -> None:
        """Call back, once, with the reason, when another rank is found to be gone or silent."""
        self._when_lost.append(callback)

    def own(self, whole: Tensor, dim: int) -> Tensor:
        """This rank's equal share of a dimension, as a view."""
        length = whole.shape[dim] // self.size
        return whole.narrow(dim, self.rank * length, length)

    def add_up(self, x: Tensor) -> Tensor:
        """Sum over ranks, in a new tensor.

        Raises:
            TransportError: a rank is gone or silent, as in all methods that talk.
        """
        total = x.detach().clone(memory_format=torch.contiguous_format)
        with self._talking():
            dist.all_reduce(total)
        return total

    def add_up_at_leader(self, x: Tensor) -> Tensor:
        """Sum over ranks at rank 0; without meaning elsewhere."""
        total = x.detach().clone(memory_format=torch.contiguous_format)
        with self._talking():
            dist.reduce(total, dst=0)
        return total

    def gather(self, own: Tensor) -> Tensor:
        """Every rank's share of the last dimension, joined."""
        shares = [own.new_empty(own.shape) for _ in range(self.size)]
        with self._talking():
            dist.all_gather(shares, own.detach().contiguous())
        return torch.cat(shares, dim=-1)

    def from_leader(self, x: Tensor) -> Tensor:
        """Rank 0's values, written into a contiguous `x` on the others."""
        with self._talking():
            dist.broadcast(x, src=0)
        return x

    def tell(self, message: bytes) -> None:
        """The leader's message to all others."""
        data = len(message).to_bytes(_LENGTH_BYTES, "little") + message
        first, rest = data[:_FIRST_BYTES].ljust(_FIRST_BYTES, b"\0"), data[_FIRST_BYTES:]
        for part in filter(None, (first, rest)):
            with self._talking():
                buffer = torch.frombuffer(bytearray(part), dtype=torch.uint8)
                dist.broadcast(buffer, src=0, group=self._control)

    def hear(self) -> bytes:
        """The leader's next message, whenever it comes."""
        first = torch.empty(_FIRST_BYTES, dtype=torch.uint8)
        with self._talking():
            dist.broadcast(first, src=0, group=self._control)
        data = first.numpy().tobytes()
        end = _LENGTH_BYTES + int.from_bytes(data[:_LENGTH_BYTES], "little")
        if end > _FIRST_BYTES:
            rest = torch.empty(end - _FIRST_BYTES, dtype=torch.uint8)
            with self._talking():
                dist.broadcast(rest, src=0, group=self._control)
            data += rest.numpy().tobytes()
        return data[_LENGTH_BYTES:end]

    def meet(self) -> None:
        """Wait, however long, until every rank is here."""
        with self._talking():
            dist.barrier(group=self._meeting)

    def give_up(self, reason: str) -> str:
        """Refuse all further calls: the ranks are no longer at the same place. The full reason."""
        if self._lost is None:
            first_line = (reason.splitlines() or [""])[0][:300]
            self._lost = (
                f"tensor-parallel rank {self.rank} of {self.size}: {first_line}; start all of its "
                "processes again"
            )
            for callback in self._when_lost:
                callback(self._lost)
        return self._lost

    def leave(self) -> None:
        """End this process's part; nothing is waited for."""
        if dist.is_initialized():
            dist.destroy_process_group()

    @contextmanager
    def _talking(self) -> Iterator[None]:
        """Map torch.distributed's errors; after the first one every call is refused at once."""
        if self._lost is not None:
            raise TransportError(self._lost)
        try:
            yield
        except RuntimeError as error:
            lost = self.give_up(f"another process of this trunk is gone or silent ({error})")
            raise TransportError(lost) from error


def own_device(device: str | torch.device) -> torch.device:
    """The device of this process: with plain "cuda", the one that `torchrun` counts for it."""
    if str(device) != "cuda":
        return torch.device(device)
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))


def join_ranks(device: torch.device, timeout_s: float) -> Ranks:
    """Meet the other processes that `torchrun` started.

    Args:
        device: of this process; a GPU talks by NCCL, a CPU by Gloo.
        timeout_s: a rank that is silent for longer within one call is lost.

    Raises:
        ConfigError: the environment is not that of `torchrun`.
        TransportError: not all came.
    """
    timeout = timedelta(seconds=timeout_s)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    try:
        if not dist.is_initialized():
            dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timeout)
        rank, size = dist.get_rank(), dist.get_world_size()
        # Of one process alone: gloo's sender waits until the receiver takes what it sends.
        patience = timeout if rank == 0 else _PATIENT
        control = dist.new_group(backend="gloo", timeout=patience)
        meeting = dist.new_group(backend="gloo", timeout=_PATIENT)
    except ValueError as error:
        raise ConfigError(f"{error}; start the processes with torchrun") from error
    except RuntimeError as error:
        raise TransportError(
            f"the processes of this tensor-parallel trunk did not meet ({error}); "
            "start all of them again"
        ) from error
    return Ranks(rank, size, control, meeting)


def sum_gradient(x: Tensor, ranks: Ranks) -> Tensor:
    """A whole tensor on its way into sharded weights: as it is; its gradient is summed."""
    return _apply(_SumGradient, x, ranks)


def sum_values(partial: Tensor, ranks: Ranks) -> Tensor:
    """Partial sums on their way out of sharded weights: summed; the gradient is as it is."""
    return _apply(_SumValues, partial, ranks)


def own_columns(whole: Tensor, ranks: Ranks) -> Tensor:
    """This rank's share of the last dimension of a whole tensor; gradients are gathered."""
    return _apply(_OwnColumns, whole, ranks)


def gather_columns(own: Tensor, ranks: Ranks) -> Tensor:
    """Every rank's share of the last dimension; the gradient of the own share goes back."""
    return _apply(_GatherColumns, own, ranks)


class _RanksContext(FunctionCtx):
    """What the functions keep for their backward."""

    ranks: Ranks


class _SumGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: _RanksContext, x: Tensor, ranks: Ranks) -> Tensor:
        ctx.ranks = ranks
        return x.view_as(x)

    @staticmethod
    def backward(ctx: _RanksContext, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.ranks.add_up(grad), None


class _SumValues(torch.autograd.Function):
    @staticmethod
    def forward(ctx: _RanksContext, x: Tensor, ranks: Ranks) -> Tensor:
        return ranks.add_up(x)

    @staticmethod
    def backward(ctx: _RanksContext, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class _OwnColumns(torch.autograd.Function):
    @staticmethod
    def forward(ctx: _RanksContext, x: Tensor, ranks: Ranks) -> Tensor:
        ctx.ranks = ranks
        return ranks.own(x, -1).clone(memory_format=torch.contiguous_format)

    @staticmethod
    def backward(ctx: _RanksContext, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.ranks.gather(grad), None


class _GatherColumns(torch.autograd.Function):
    @staticmethod
    def forward(ctx: _RanksContext, x: Tensor, ranks: Ranks) -> Tensor:
        ctx.ranks = ranks
        return ranks.gather(x)

    @staticmethod
    def backward(ctx: _RanksContext, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.ranks.own(grad, -1).clone(memory_format=torch.contiguous_format), None


def _apply(function: type[torch.autograd.Function], x: Tensor, ranks: Ranks) -> Tensor:
    y = function.apply(x, ranks)
    assert isinstance(y, Tensor)
    return y
