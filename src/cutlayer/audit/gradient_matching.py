"""Gradient matching: soft labels are optimised until the tail's gradient is the one that left.

It does not choose the start (`attacks`) nor solve in closed form (`tail_labels`).

Shapes: L = vectors of one row, S = scored places, D = hidden size, V = vocabulary.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from cutlayer.audit.evidence import Evidence, Observation
from cutlayer.audit.tail_gradients import Silence, TailRow
from cutlayer.errors import ConfigError
from cutlayer.privacy.mechanism import Mechanism

__all__ = ["match_gradient", "with_gradients"]

_BETA = 0.85
_LEARNING_RATE = 0.3


def match_gradient(
    row: TailRow,
    gradient_LD: Tensor,
    rule: Mechanism,
    places_S: Tensor,
    start_SV: Tensor,
    num_steps: int,
    is_time_up: Callable[[], bool] = lambda: False,
) -> Tensor:
    """Log probabilities of the labels at scored places, [S, V].

    Args:
        row: the row's y in the tail.
        gradient_LD: what was released.
        rule: what was done to it; its clip is applied to every candidate.
        places_S: places that predict something.
        start_SV: logits of the soft labels to start from.
        num_steps: of AdamW.
        is_time_up: asked before each step.

    Source: TAG (arXiv 2103.06819), distance 0.85 L2 + 0.15 L1 between the gradients, as used at a
        cut by BiSR (arXiv 2409.00960, section 4.3). Gradients are measured in their own mean
        magnitude, so that the two terms weigh the same in every model.
    """
    soft_SV = start_SV.detach().clone().requires_grad_()
    expected_SV = row.log_probs_LV[places_S].exp()
    unit = gradient_LD.square().mean().sqrt().clamp_min(1e-30)
    silence = Silence([len(gradient_LD)])
    optimizer = torch.optim.AdamW([soft_SV], lr=_LEARNING_RATE, eps=1e-12, weight_decay=0.0)
    for _ in range(num_steps):
        if is_time_up():
            break
        optimizer.zero_grad()
        step_SV = expected_SV - torch.softmax(soft_SV, 1)
        candidate_LD = rule.apply(row.from_logits(places_S, step_SV), silence)
        gap_LD = (candidate_LD - gradient_LD) / unit
        distance = _BETA * gap_LD.square().sum() + (1 - _BETA) * gap_LD.abs().sum()
        (soft_SV.grad,) = torch.autograd.grad(distance, soft_SV)
        optimizer.step()
    return torch.log_softmax(soft_SV.detach(), 1)


def with_gradients(evidence: Evidence) -> list[tuple[Observation, Tensor, Tensor]]:
    """The observations that have a reply and a released gradient, with y and that gradient.

    Raises:
        ConfigError: there are none.
    """
    found = [
        (observation, observation.y_LD, observation.gradient_LD)
        for observation in evidence.observations
        if observation.y_LD is not None and observation.gradient_LD is not None
    ]
    if not found:
        raise ConfigError(
            "the evidence holds no gradient together with the trunk's reply; this attack needs a "
            "recording of training steps in which trunk or head trains"
        )
    return found
