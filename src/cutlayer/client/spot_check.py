"""The trunk computed again by the client, one row at a time, where it holds the public weights.

It does not choose what is checked or raise for it (`returned`), and sends nothing: a comparison
tells what is wrong, or None.

Shapes: L = vectors of one row, D = hidden size.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from cutlayer.client.run_state import StepRecord
from cutlayer.errors import ConfigError, ModelError
from cutlayer.model.adapters import AdapterSettings, AdapterState, attach
from cutlayer.model.checkpoint import load_part
from cutlayer.model.folder import ModelFolder
from cutlayer.model.optimizer import AdamWSettings
from cutlayer.model.part_settings import TrunkWeights
from cutlayer.model.partition import Cut, Part
from cutlayer.model.rows import Rows

__all__ = ["CheckedModel", "PublicTrunk", "Sample", "largest_move"]

_TOLERANCES = {"raw": 2e-3, "bf16": 2e-2, "int8": 0.1, "fp8": 0.15}
"""Relative error of a row by codec: that of honest replies is at most a third."""
_HALF_TOLERANCE = 0.1
"""Where weights have 16 bits or fewer and another machine sums or rounds in another order."""
_ROUNDING = 1.05


@dataclass(frozen=True, kw_only=True)
class CheckedModel:
    """What trunk a client expects at the server."""

    folder: ModelFolder
    cut: Cut
    dtype: str
    device: str
    weights: TrunkWeights
    codec: str
    """Of what the server returns."""
    adapter: AdapterSettings
    optimizer: AdamWSettings


@dataclass(kw_only=True)
class Sample:
    """One row of a call, kept until it is known which adapter the server declares."""

    where: str
    """For the message."""
    step: int
    """The step that was computed; its weights are those of the step before."""
    start: int = 0
    """Where the returned vectors begin in the row."""
    h_LD: Tensor = field(repr=False)
    """What the server has of the row."""
    y_LD: Tensor = field(repr=False)
    """What it returned from `start` on."""
    gradient_LD: Tensor | None = field(default=None, repr=False)
    input_gradient_LD: Tensor | None = field(default=None, repr=False)


class PublicTrunk:
    """Base weights of the trunk, and the adapters that the server declares."""

    def __init__(self, model: CheckedModel) -> None:
        """Load the weights.

        Raises:
            ConfigError: dropout, which only the server draws, would change what is returned.
            ModelError: the folder does not have the trunk's weights.
        """
        self._trunk = load_part(
            model.folder, model.cut, Part.TRUNK, model.dtype, model.device, model.weights
        )
        self._adapter = attach(self._trunk, model.adapter)
        self._declared = self._adapter.state()
        self._declared_step = 0
        self._optimizer = model.optimizer
        tolerance = _TOLERANCES[model.codec]
        is_exact = model.dtype == "float32" and model.weights is TrunkWeights.FULL
        self._tolerance = tolerance if is_exact else tolerance + _HALF_TOLERANCE
        if model.adapter.dropout > 0:
            raise ConfigError(
                f"adapter.dropout={model.adapter.dropout}: the server draws what is dropped, so no "
                "step can be recomputed; set it to 0 or remove checks.spot_check_every"
            )

    @property
    def is_trained(self) -> bool:
        """Whether the trunk has an adapter, so that it matters which one the server declares."""
        return bool(self._adapter.trained_keys())

    def declared_fault(
        self, declared: AdapterState, step: int, history: Sequence[StepRecord]
    ) -> str | None:
        """What is wrong with an adapter that training is said to have led to.

        Args:
            declared: the server's adapter at `step`.
            step: a finished step; 0 before the first.
            history: the run's steps.
        """
        found = self.load(declared)
        if found is not None:
            return found
        moved = max((float((declared[k] - v).abs().max()) for k, v in self._declared.items()))
        between = [r for r in history if self._declared_step < r.step <= step]
        if step < self._declared_step:
            between = []  # the run went back: what was declared later says nothing
        elif moved > sum(largest_move(r.lr, self._optimizer, declared) for r in between):
            return f"the adapter that it declares moved by {moved:.3g}, more than AdamW can"
        elif moved == 0 and any(r.num_scored and r.lr > 0 and r.grad_norm > 0 for r in between):
            return f"the adapter that it declares has not moved in {len(between)} steps"
        self._declared, self._declared_step = dict(declared), step
        return None

    def load(self, declared: AdapterState | None) -> str | None:
        """Compute with an adapter, None is the base model; what is wrong with it."""
        if declared is None:
            self._adapter.deactivate()
            return None
        try:
            self._adapter.load(declared)
        except ModelError as error:
            return f"the adapter that it declares is none of this run: {error}"
        self._adapter.activate()
        return None

    def fault(self, sample: Sample) -> str | None:
        """Where the reply differs from what the weights give; None where it does not."""
        h_LD = sample.h_LD.detach().clone().requires_grad_(sample.gradient_LD is not None)
        y_LD = self._run(h_LD)
        found = _difference(y_LD.detach()[sample.start :], sample.y_LD)
        if found > self._tolerance:
            return _told(sample.where, "output", found, self._tolerance)
        if sample.gradient_LD is None or sample.input_gradient_LD is None:
            return None
        (expected_LD,) = torch.autograd.grad(y_LD, h_LD, sample.gradient_LD.to(y_LD))
        found = _difference(expected_LD, sample.input_gradient_LD)
        if found > self._tolerance:
            return _told(sample.where, "gradient", found, self._tolerance)
        return None

    def _run(self, h_LD: Tensor) -> Tensor:
        like = self._trunk.zeros_ND(1)
        with torch.inference_mode(False), torch.set_grad_enabled(h_LD.requires_grad):
            y_LD: Tensor = self._trunk(h_LD.to(like), Rows(lengths=(len(h_LD),)))
        return y_LD.to("cpu", torch.float32)


def largest_move(lr: float, settings: AdamWSettings, weights: Mapping[str, Tensor]) -> float:
    """How far one step of AdamW can move any weight.

    The first moment is a mean of gradients with weights a_i, the second of their squares with b_i;
    by Cauchy and Schwarz their ratio is at most the root of the sum of a_i^2 / b_i, here without
    end. The decay of the weights themselves is added.

    Args:
        lr: learning rate of the step.
        settings: of the optimizer.
        weights: that are decayed.

    Source: Kingma and Ba, Adam (arXiv 1412.6980), section 2.1, which bounds the usual case.
    """
    beta1, beta2 = settings.beta1, settings.beta2
    if beta1**2 >= beta2:
        return math.inf
    ratio = (1 - beta1) / math.sqrt((1 - beta2) * (1 - beta1**2 / beta2))
    largest = max((float(x.abs().max()) for x in weights.values()), default=0.0)
    return _ROUNDING * lr * (max(1.0, ratio) + 2 * settings.weight_decay * largest) + 1e-6


def _difference(expected_LD: Tensor, returned_LD: Tensor) -> float:
    """Relative error of the whole, or of the worst vector as far as it is five times that."""
    error_LD = expected_LD - returned_LD
    scale = float(expected_LD.norm())
    whole = float(error_LD.norm()) / max(scale, 1e-30)
    mean_norm = scale / math.sqrt(len(expected_LD))
    norms_L = expected_LD.norm(dim=1).clamp_min(0.01 * mean_norm + 1e-30)
    return max(whole, float((error_LD.norm(dim=1) / norms_L).max()) / 5)


def _told(where: str, what: str, found: float, allowed: float) -> str:
    return (
        f"recomputed with the public weights, the {what} of {where} differs by {found:.2g} of its "
        f"size (allowed {allowed:.2g})"
    )
