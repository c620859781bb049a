"""AdamW over one part's adapter, stepped by the rule of the unsplit model's clipped step.

It does not talk to the other side: the other parts' squared norm comes in as a number.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol

import torch
from pydantic import Field
from torch import Tensor, nn

from cutlayer.errors import ModelError
from cutlayer.settings import Settings

__all__ = ["AdamWSettings", "PartOptimizer", "Trained", "gradient_scale"]


class AdamWSettings(Settings):
    """AdamW (Loshchilov and Hutter, arXiv 1711.05101) as torch.optim.AdamW computes it."""

    beta1: float = Field(default=0.9, ge=0, lt=1)
    """Decay of the first moment."""
    beta2: float = Field(default=0.999, ge=0, lt=1)
    """Decay of the second moment."""
    eps: float = Field(default=1e-8, gt=0)
    """Added to the root of the second moment."""
    weight_decay: float = Field(default=0.0, ge=0)
    """Decoupled decay, per unit of learning rate."""


class Trained(Protocol):
    """What learns: an adapter, or the tail's denoiser."""

    def trained_keys(self) -> list[str]:
        """Names of `parameters`, in their order."""

    def parameters(self) -> Iterable[nn.Parameter]:
        """The weights that learn."""

    def sq_norm(self) -> float:
        """Squared L2 norm of their gradients."""


class PartOptimizer:
    """The optimizer of one part; all parts take the same step from the same scalars."""

    def __init__(self, adapter: Trained, settings: AdamWSettings) -> None:
        self._adapter = adapter
        self._names = adapter.trained_keys()
        self._parameters = list(adapter.parameters())
        self._adamw = _adamw(self._parameters, settings)

    def sq_norm(self) -> float:
        """Squared L2 norm of the accumulated gradients of the summed loss."""
        return self._adapter.sq_norm()

    def step(self, scale: float, lr: float) -> None:
        """Scale the accumulated gradients, step, forget them.

        Args:
            scale: see `gradient_scale`; the same number at every part.
            lr: learning rate of this step.
        """
        if self._adamw is None:
            return
        grads = [p.grad for p in self._parameters if p.grad is not None]
        if grads:
            # One call for all: a small adapter has hundreds of small tensors.
            torch._foreach_mul_(grads, scale)
        for group in self._adamw.param_groups:
            group["lr"] = lr
        self._adamw.step()
        self.clear()

    def clear(self) -> None:
        """Drop accumulated gradients."""
        for parameter in self._parameters:
            parameter.grad = None

    def state(self) -> dict[str, Tensor]:
        """Moments and step counts, keyed `NAME.exp_avg` and so on; empty before the first step."""
        if self._adamw is None:
            return {}
        state = self._adamw.state
        return {
            f"{name}.{key}": value
            for name, parameter in zip(self._names, self._parameters, strict=True)
            for key, value in state.get(parameter, {}).items()
        }

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Put back what `state()` gave.

        Raises:
            ModelError: a tensor belongs to no parameter of this adapter.
        """
        if self._adamw is None:
            return
        self.clear()
        self._adamw.state.clear()
        by_name = dict(zip(self._names, self._parameters, strict=True))
        for key, value in state.items():
            name, _, kind = key.rpartition(".")
            if name not in by_name:
                raise ModelError(
                    f"optimizer state {key} fits no parameter; was the adapter changed?"
                )
            self._adamw.state[by_name[name]][kind] = value.clone()


def gradient_scale(sq_norm: float, num_tokens: int, clip_norm: float | None) -> float:
    """What turns gradients of the summed loss into clipped gradients of the mean loss.

    Equals dividing by the tokens and then `torch.nn.utils.clip_grad_norm_(max_norm=clip_norm)`.

    Args:
        sq_norm: squared norm over all parts, of the summed loss.
        num_tokens: label tokens of the step; 0 gives a scale of 0.
        clip_norm: largest global norm of the mean gradient; None does not clip.
    """
    if num_tokens == 0:
        return 0.0
    scale = 1.0 / num_tokens
    if clip_norm is None:
        return scale
    return scale * min(1.0, clip_norm / (math.sqrt(sq_norm) * scale + 1e-6))


def _adamw(parameters: Sequence[Tensor], settings: AdamWSettings) -> torch.optim.AdamW | None:
    if not parameters:
        return None
    return torch.optim.AdamW(
        parameters,
        lr=0.0,
        betas=(settings.beta1, settings.beta2),
        eps=settings.eps,
        weight_decay=settings.weight_decay,
        # One call instead of a dozen per tensor; a server steps the adapters of many clients.
        fused=True,
    )
