"""The tail as a linear map from what the labels do to the gradient that left.

At known y the gradient of the summed loss is linear in (p - label): this module pushes changes of
logits or of the states before the final norm down to the cut, and solves the way back. It decides
nothing about labels (`tail_labels`, `gradient_matching`).

Shapes: L = vectors of one row, S = places, K = candidates, D = hidden size, V = vocabulary.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from cutlayer.model.partition import Tail
from cutlayer.model.rows import Rows
from cutlayer.privacy.mechanism import Mechanism
from cutlayer.privacy.noise import RowNoise

__all__ = ["Readout", "Silence", "TailRow", "clip_factors", "noise_variance"]

_SMALL = 1e-3
_NUM_DRAWS = 64
_STEPS_BETWEEN_LOOKS = 8
"""At the clock."""


class Silence:
    """Stands for a rule's noise where the attacker wants its clip alone. See `Noise`."""

    def __init__(self, lengths: Sequence[int]) -> None:
        self._lengths = tuple(lengths)

    @property
    def lengths(self) -> tuple[int, ...]:
        """Vectors per row."""
        return self._lengths

    def standard_normal(self, num_vectors: int, width: int) -> Tensor:
        """Zeros."""
        return torch.zeros(num_vectors, width)


class Readout:
    """The LM head as a matrix: row v is what a step of logit v asks of the normed states."""

    def __init__(self, tail: Tail) -> None:
        zero_D = torch.zeros(1, tail.hidden_size)
        # Small, so that a cap on the logits is not felt.
        basis_DD = _SMALL * torch.eye(tail.hidden_size)
        with torch.no_grad():
            zero_1V = tail.logits(zero_D)
            self.rows_DV = (tail.logits(basis_DD) - zero_1V) / _SMALL
            probe_D = 100 * torch.linspace(-1, 1, tail.hidden_size)[None]
            straight_1V = probe_D @ self.rows_DV + zero_1V
            self.is_linear = torch.allclose(tail.logits(probe_D), straight_1V, 1e-2, 1e-2)
        """Whether logits have no cap."""
        self._squares_DV = self.rows_DV.square()

    def correlated(self, q_SD: Tensor) -> Tensor:
        """Products of every row with S vectors, [S, V]."""
        return q_SD @ self.rows_DV

    def weighted_squares(self, weights_SD: Tensor) -> Tensor:
        """Per place and token the squared row, summed with weights, [S, V]."""
        return weights_SD @ self._squares_DV


class TailRow:
    """One row of y pushed through the tail once, ready for many gradients."""

    def __init__(self, tail: Tail, y_LD: Tensor) -> None:
        """
        Args:
            tail: as the attacker knows it.
            y_LD: what the trunk returned for the row.
        """
        self._tail = tail
        self._norm = getattr(tail.base, tail.layout.norm)
        self._y_LD = y_LD.detach().float().clone().requires_grad_()
        entered: list[Tensor] = []
        handle = self._norm.register_forward_pre_hook(lambda _, given: entered.append(given[0]))
        try:
            # The plain kernel is the one that can be differentiated twice.
            with sdpa_kernel(SDPBackend.MATH):
                self._normed_LD = tail.run_blocks(self._y_LD, Rows(lengths=(len(y_LD),)))
        finally:
            handle.remove()
        self._entered_1LD = entered[0]
        self.x_LD = entered[0].detach()[0]
        """States before the final norm."""
        with torch.no_grad():
            self.log_probs_LV = torch.log_softmax(tail.logits(self._normed_LD).float(), 1)
        """What the tail expects after each place."""

    def from_states(self, v_LD: Tensor) -> Tensor:
        """The gradient at y of v . x, where x are the states before the final norm."""
        (gradient_LD,) = torch.autograd.grad(
            self._entered_1LD, self._y_LD, v_LD[None], retain_graph=True, create_graph=True
        )
        return gradient_LD

    def from_logits(self, places_S: Tensor, step_SV: Tensor) -> Tensor:
        """The gradient at y of the logits at S places times `step_SV`, in the graph of these."""
        logits_SV = self._tail.logits(self._normed_LD[places_S])
        (gradient_LD,) = torch.autograd.grad(
            logits_SV, self._y_LD, step_SV, retain_graph=True, create_graph=True
        )
        return gradient_LD

    def of_labels(self, places_S: Tensor, labels_S: Tensor) -> Tensor:
        """The gradient that the owner would have computed, [L, D], before any rule."""
        if not len(places_S):
            return torch.zeros_like(self._y_LD)
        step_SV = self.log_probs_LV[places_S].exp()
        step_SV[torch.arange(len(places_S)), labels_S] -= 1.0
        return self.from_logits(places_S, step_SV).detach()

    def to_states(
        self,
        gradient_LD: Tensor,
        num_iterations: int,
        is_time_up: Callable[[], bool] = lambda: False,
    ) -> Tensor:
        """The v whose `from_states` is nearest to a gradient, by so many steps of LSQR's kin CGLS.

        Args:
            gradient_LD: what is to be explained.
            num_iterations: at most.
            is_time_up: asked now and then; the nearest so far is then the answer.

        Source: Hestenes and Stiefel (1952), conjugate gradients on the normal equations. Few steps
            also keep noise from being blown up.
        """
        v_LD = torch.zeros_like(gradient_LD)
        rest_LD = gradient_LD.clone()
        slope_LD = self._transposed(rest_LD)
        direction_LD, power = slope_LD.clone(), float(slope_LD.square().sum())
        first_power = power
        for number in range(num_iterations):
            if power <= 1e-14 * first_power or power == 0.0:
                break
            if number % _STEPS_BETWEEN_LOOKS == 0 and is_time_up():
                break
            image_LD = self.from_states(direction_LD).detach()
            length = power / max(float(image_LD.square().sum()), 1e-38)
            v_LD += length * direction_LD
            rest_LD -= length * image_LD
            slope_LD = self._transposed(rest_LD)
            power, last = float(slope_LD.square().sum()), power
            direction_LD = slope_LD + power / last * direction_LD
        return v_LD

    def _transposed(self, r_LD: Tensor) -> Tensor:
        """How the states before the norm move when y moves by r."""
        v_LD = torch.zeros_like(r_LD).requires_grad_()
        (moved_LD,) = torch.autograd.grad(self.from_states(v_LD), v_LD, r_LD)
        return moved_LD

    def expected_states(self) -> Tensor:
        """Per place the part of the loss's gradient at x that no label changes, [L, D]."""
        x_LD = self.x_LD.clone().requires_grad_()
        total = torch.logsumexp(self._tail.logits(self._norm(x_LD)).float(), 1).sum()
        (expected_LD,) = torch.autograd.grad(total, x_LD)
        return expected_LD

    def norm_jacobian(self, place: int) -> Tensor:
        """How the normed states at a place follow x there; row i is normed value i, [D, D]."""
        x_D = self.x_LD[place]
        x_DD = x_D.expand(len(x_D), -1).clone().requires_grad_()
        (rows_DD,) = torch.autograd.grad(self._norm(x_DD), x_DD, torch.eye(len(x_D)))
        return rows_DD

    def label_states(self, place: int, candidates_K: Tensor, readout: Readout) -> Tensor:
        """Gradient at x of the logit of each candidate at one place, [K, D]."""
        if readout.is_linear:
            return readout.rows_DV[:, candidates_K].T @ self.norm_jacobian(place)
        x_KD = self.x_LD[place].expand(len(candidates_K), -1).clone().requires_grad_()
        logits_KV = self._tail.logits(self._norm(x_KD))
        chosen_K = logits_KV.gather(1, candidates_K[:, None]).sum()
        (states_KD,) = torch.autograd.grad(chosen_K, x_KD)
        return states_KD


def noise_variance(rule: Mechanism, width: int) -> float:
    """Of the rule's noise on each value, measured on zeros, which no clip changes."""
    keys = [bytes([number]) * 32 for number in range(_NUM_DRAWS)]
    drawn_ND = rule.apply(torch.zeros(_NUM_DRAWS, width), RowNoise(keys, [1] * _NUM_DRAWS))
    return float(drawn_ND.square().mean())


def clip_factors(rule: Mechanism, gradient_LD: Tensor) -> Tensor:
    """What share of each vector the rule's clip leaves, [L]."""
    clipped_LD = rule.apply(gradient_LD, Silence([len(gradient_LD)]))
    squares_L = gradient_LD.square().sum(1)
    factors_L = (clipped_LD * gradient_LD).sum(1) / squares_L.clamp_min(1e-38)
    return torch.where(squares_L > 0, factors_L, torch.ones_like(factors_L))
