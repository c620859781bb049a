"""A small module before the tail that takes noise off what the trunk returns.

The owner alone knows the vectors as they were before noise, so it can learn what the noise did on
its way through the trunk. It is the owner's own: it neither leaves nor becomes part of an adapter.

Shapes: N = tokens of all rows, D = hidden size, R = inner width, F = 3 D.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from cutlayer.errors import ModelError
from cutlayer.model.partition import Tail

__all__ = ["DENOISER_PREFIX", "Denoiser", "Passed", "attach_denoiser", "denoised"]

DENOISER_PREFIX = "denoiser."
"""Begins the keys of a denoiser's weights in a saved tail."""

_ATTRIBUTE = "cutlayer_denoiser"
_GAIN = 16.0
"""The gate's way to 1 takes some dozen steps of a usual learning rate."""
_LEAST_WIDTH = 8
_EPS = 1e-6


@dataclass(frozen=True, kw_only=True)
class Passed:
    """What was about to cross the lower cut, and what did; both before they were encoded."""

    h_ND: Tensor = field(repr=False)
    """Head output; it stays with the owner."""
    sent_ND: Tensor = field(repr=False)
    """After clip and noise; maybe in the graph."""


class Denoiser(nn.Module):
    """y - gate * (sent - h) + W_out silu(W_in [y, h, sent - h]); the identity at first.

    Residual connections carry the noise through the trunk as it is, which the gate takes off; the
    rest is for what blocks made of it.

    Source: Mai et al., Split-and-Denoise (arXiv 2310.09130), section 5, whose denoiser is given
        the same three; a gate and one hidden layer stand for its transformer here.
    """

    def __init__(self, width: int, seed: int) -> None:
        """
        Args:
            width: D.
            seed: of the initial weights.
        """
        super().__init__()
        inner = max(_LEAST_WIDTH, width // 4)
        generator = torch.Generator().manual_seed(seed % 2**63)
        drawn_RF = torch.rand(inner, 3 * width, generator=generator) * 2 - 1
        self.gate_D = nn.Parameter(torch.zeros(width))
        self.inner_RF = nn.Parameter(drawn_RF / math.sqrt(3 * width))
        self.outer_DR = nn.Parameter(torch.zeros(width, inner))

    def forward(self, y_ND: Tensor, passed: Passed) -> Tensor:
        """What the trunk would rather have returned, in the dtype of `y_ND`.

        Args:
            y_ND: what it returned.
            passed: what it was given; no gradient flows there.
        """
        place = self.gate_D.device
        y, h, sent = (
            x_ND.to(place, torch.float32)
            for x_ND in (y_ND, passed.h_ND.detach(), passed.sent_ND.detach())
        )
        noise_ND, size_N1 = sent - h, torch.maximum(_rms(h), _rms(sent))
        features_NF = torch.cat([y / _rms(y), h / size_N1, noise_ND / size_N1], dim=1)
        bent_ND = nn.functional.silu(features_NF @ self.inner_RF.T) @ self.outer_DR.T
        shift_ND = torch.maximum(_rms(y), _rms(h)) * bent_ND - _GAIN * self.gate_D * noise_ND
        return y_ND + shift_ND.to(y_ND)

    def trained_keys(self) -> list[str]:
        """Names of `parameters`, in their order."""
        return [name for name, _ in self.named_parameters()]

    def sq_norm(self) -> float:
        """Squared L2 norm of all gradients."""
        grads = [p.grad for p in self.parameters() if p.grad is not None]
        return math.fsum(float(grad.double().square().sum()) for grad in grads)

    def state(self) -> dict[str, Tensor]:
        """A copy of the weights on the CPU; keys begin with `DENOISER_PREFIX`."""
        return {
            f"{DENOISER_PREFIX}{name}": p.detach().cpu().clone()
            for name, p in self.named_parameters()
        }

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Take over weights that `state` gave; other keys are ignored.

        Raises:
            ModelError: a weight is missing or has another shape.
        """
        for key, value in self.state().items():
            if key not in state or state[key].shape != value.shape:
                raise ModelError(
                    f"the saved tail has no {key} of shape {tuple(value.shape)}; was the model or "
                    "privacy.denoiser changed?"
                )
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                parameter.copy_(state[f"{DENOISER_PREFIX}{name}"])


def attach_denoiser(tail: Tail, seed: int) -> Denoiser:
    """Give a tail a fresh denoiser."""
    weight = tail.lm_head.get_parameter("weight")
    denoiser = Denoiser(weight.shape[1], seed).to(weight.device)
    # No submodule: it is none of the base model's weights, which attaching an adapter freezes.
    vars(tail)[_ATTRIBUTE] = denoiser
    return denoiser


def denoised(tail: Tail, y_ND: Tensor, passed: Passed) -> Tensor:
    """What the tail's denoiser makes of the trunk's output; the output itself without one."""
    denoiser = vars(tail).get(_ATTRIBUTE)
    if denoiser is None:
        return y_ND
    assert isinstance(denoiser, Denoiser)
    corrected_ND: Tensor = denoiser(y_ND, passed)
    return corrected_ND


def _rms(x_ND: Tensor) -> Tensor:
    """Root mean square of each vector, [N, 1], away from 0: withheld ones may be nothing."""
    return x_ND.detach().square().mean(dim=1, keepdim=True).sqrt().clamp_min(_EPS)
