"""Head and tail with their adapters and optimizers: the client's share of one optimizer step.

It does not send or save; it knows nothing of the trunk but the global scale of a step.

Shapes: N = tokens of all rows of a micro-batch, D = hidden size.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from cutlayer.errors import StorageError
from cutlayer.model.adapters import Adapter, AdapterSettings, attach
from cutlayer.model.denoiser import DENOISER_PREFIX, attach_denoiser
from cutlayer.model.optimizer import AdamWSettings, PartOptimizer
from cutlayer.model.partition import Head, Part, Tail
from cutlayer.model.rows import Rows

__all__ = ["TrainedParts", "head_output"]

_DENOISER = "denoiser"


class TrainedParts:
    """Both parts of the client, ready to train."""

    def __init__(
        self,
        head: Head,
        tail: Tail,
        adapter: AdapterSettings,
        optimizer: AdamWSettings,
        seed: int,
        denoises: bool = False,
    ) -> None:
        """
        Args:
            head: the owner's first blocks.
            tail: the owner's last blocks.
            adapter: what is trained.
            optimizer: how.
            seed: of dropout and of the denoiser.
            denoises: whether the tail has a denoiser, which learns with it.
        """
        self.head = head
        self.tail = tail
        self._seed = seed
        self.trunk_trains = Part.TRUNK in adapter.parts
        self._adapters: dict[str, Adapter] = {
            str(Part.HEAD): attach(head, adapter),
            str(Part.TAIL): attach(tail, adapter),
        }
        self._optimizers = {
            name: PartOptimizer(attached, optimizer) for name, attached in self._adapters.items()
        }
        self._denoiser = attach_denoiser(tail, seed) if denoises else None
        if self._denoiser is not None:
            self._optimizers[_DENOISER] = PartOptimizer(self._denoiser, optimizer)

    @property
    def head_trains(self) -> bool:
        """Whether a gradient at the lower cut is of any use."""
        return any(p.requires_grad for p in self.head.parameters())

    def head_forward(self, rows: Rows) -> Tensor:
        """Head output [N, D]; see `head_output` for a frozen head."""
        if not self.head_trains:
            return head_output(self.head, rows)
        h_ND: Tensor = self.head(rows)
        return h_ND

    def seed_dropout(self, step: int, micro: int) -> None:
        """The same places drop when a step is repeated."""
        torch.manual_seed(((self._seed * 1_000_003 + step) * 1_009 + micro) % 2**63)

    def set_training(self, is_training: bool) -> None:
        """Dropout on or off; a head that does not learn never drops, so its releases replay."""
        self.head.train(is_training and self.head_trains)
        self.tail.train(is_training)

    def use_adapters(self, are_used: bool) -> None:
        """Compute with the adapters, or as the base model, which costs less than untrained ones."""
        for adapter in self._adapters.values():
            if are_used:
                adapter.activate()
            else:
                adapter.deactivate()

    def sq_norm(self) -> float:
        """Squared norm of head and tail gradients of the summed loss."""
        return sum(optimizer.sq_norm() for optimizer in self._optimizers.values())

    def step(self, scale: float, lr: float) -> None:
        """Take the optimizer step that the trunk takes too."""
        for optimizer in self._optimizers.values():
            optimizer.step(scale, lr)

    def step_towards(
        self, scale: float, lr: float, start: Mapping[str, Mapping[str, Tensor]], weight: float
    ) -> None:
        """A step on the loss plus weight / 2 times the squared distance from `start`.

        Args:
            scale: as in `step`.
            lr: as in `step`.
            start: adapter states of head and tail, by part.
            weight: mu of FedProx.

        Source: Li et al., Federated Optimization in Heterogeneous Networks (arXiv 1812.06127).
        """
        for name, adapter in self._adapters.items():
            for key, parameter in adapter.trainable().items():
                if parameter.grad is not None and scale:
                    # Before the scale: `step` multiplies the sum by it.
                    distance = parameter.detach() - start[name][key].to(parameter.device)
                    parameter.grad.add_(distance, alpha=weight / scale)
        self.step(scale, lr)

    def adapter_states(self) -> dict[str, dict[str, Tensor]]:
        """Copies of both adapters' weights, by part; the denoiser is no part of them."""
        return {name: dict(adapter.state()) for name, adapter in self._adapters.items()}

    def clear_gradients(self) -> None:
        """Forget accumulated gradients."""
        for optimizer in self._optimizers.values():
            optimizer.clear()

    def gradient_states(self) -> dict[str, dict[str, Tensor]]:
        """Copies of both adapters' accumulated gradients of the summed loss, by part."""
        return {
            name: {
                key: torch.zeros_like(p, device="cpu") if p.grad is None else p.grad.cpu().clone()
                for key, p in adapter.trainable().items()
            }
            for name, adapter in self._adapters.items()
        }

    def start_from(self, state: Mapping[str, Tensor]) -> None:
        """Take over adapter weights of both parts, with fresh optimizers.

        Args:
            state: keys of head and tail together, as a federation's round gives them.
        """
        for name, adapter in self._adapters.items():
            adapter.load({key: state[key] for key in adapter.state() if key in state})
            self._optimizers[name].load({})

    def state(self) -> dict[str, dict[str, Tensor]]:
        """Adapters and optimizers, by file name."""
        adapters = self.adapter_states()
        if self._denoiser is not None:
            adapters[str(Part.TAIL)] |= self._denoiser.state()
        moments = {f"{name}_optimizer": o.state() for name, o in self._optimizers.items()}
        return {**adapters, **moments}

    def load(self, tensors: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Put back what `state` gave, and forget gradients of an unfinished step.

        Raises:
            StorageError: the saved step is of a run that trained other parts.
        """
        if tensors.keys() != self.state().keys():
            raise StorageError(
                f"the saved step has {sorted(tensors)}, this run {sorted(self.state())}; "
                "were adapter.parts changed?"
            )
        for name, adapter in self._adapters.items():
            state = tensors[name]
            adapter.load({k: v for k, v in state.items() if not k.startswith(DENOISER_PREFIX)})
        if self._denoiser is not None:
            self._denoiser.load(tensors[str(Part.TAIL)])
        for name, optimizer in self._optimizers.items():
            optimizer.load(tensors[f"{name}_optimizer"])


def head_output(head: Head, rows: Rows) -> Tensor:
    """Output [N, D] of a head that does not change, each row computed alone.

    A row's bits then do not depend on its neighbours, so the same row gives the same release in
    every epoch: noise is drawn once and cannot be averaged away.
    """
    if rows.num_rows == 1:
        h_ND: Tensor = head(rows)
        return h_ND
    assert rows.tokens_N is not None
    pieces = rows.tokens_N.split(rows.lengths)
    with torch.no_grad():
        return torch.cat(
            [
                head(Rows(lengths=(len(piece),), starts=(start,), tokens_N=piece))
                for piece, start in zip(pieces, rows.starts, strict=True)
            ]
        )
