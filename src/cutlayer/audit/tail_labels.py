"""Which places of a row are scored and with which labels, read off the gradient that left.

It does not optimise soft labels (`gradient_matching`) and is no attack by itself (`attacks`).

Shapes: L = vectors of one row, S = places, K = candidates, D = hidden size, V = vocabulary.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from cutlayer.audit.tail_gradients import Readout, TailRow, clip_factors, noise_variance
from cutlayer.model.partition import Tail
from cutlayer.privacy.mechanism import Mechanism

__all__ = ["LabelGuess", "LabelReader", "RowLabels"]

_NUM_ITERATIONS = 40
_NUM_ROUNDS = 3
_EXPLAINED = 0.01
"""Share of the gradient that may stay unexplained at the end."""
_NUM_LIKELY, _NUM_NEAR = 64, 192
_LOG_SCORED = math.log(0.5)
_SURE = 0.9
"""A place whose gradient vanishes is scored with its own prediction, if that is as sure as this."""
_ROUNDING = 1e-4
"""Share of a vector's norm that codecs and float32 may change."""
_PLACES_BETWEEN_LOOKS = 16
"""At the clock."""


@dataclass(frozen=True, kw_only=True)
class RowLabels:
    """The answer for one row."""

    labels_L: Tensor = field(repr=False)
    """Int64, aligned with the tokens: entry t is predicted at t - 1; -1 where not scored."""
    confidences_L: Tensor = field(repr=False)
    """0 to 1."""
    is_finished: bool = True
    """Whether time did not end it."""


@dataclass(frozen=True, kw_only=True)
class LabelGuess:
    """The best candidate at one place."""

    token: int
    """-1: nothing is scored here."""
    confidence: float


class LabelReader:
    """Reads rows, one after the other, through one tail and one rule."""

    def __init__(self, tail: Tail, rule: Mechanism) -> None:
        """
        Args:
            tail: as the attacker knows it.
            rule: what was done to the gradients.
        """
        self._readout, self._rule = Readout(tail), rule
        self._variance = noise_variance(rule, tail.hidden_size)
        self._is_clipped = rule.event(1).clip is not None

    def read(
        self,
        row: TailRow,
        gradient_LD: Tensor,
        is_time_up: Callable[[], bool] = lambda: False,
    ) -> RowLabels:
        """Solve for the change of the states before the norm, place by place match, and repeat.

        Each round asks only what the labels found so far leave unexplained; where the rule clips,
        it also undoes the clip that these labels would have met.

        Args:
            row: the row's y in the tail.
            gradient_LD: what was released.
            is_time_up: asked within a round, which takes long for long rows; the labels found so
                far are then the answer.
        """
        last = _last_touched(gradient_LD)
        length = len(gradient_LD)
        labels_L = torch.full((length,), -1)
        confidences_L = torch.zeros(length)
        if last < 0:
            return RowLabels(labels_L=labels_L, confidences_L=confidences_L)
        expected_LD = row.expected_states()
        # The last vector predicts nothing of this row.
        num_places = min(last, length - 2) + 1
        states_LD = torch.zeros_like(gradient_LD)
        for _ in range(_NUM_ROUNDS):
            target_LD = self._unclipped(row, gradient_LD, labels_L)
            rest_LD = target_LD - row.from_states(states_LD).detach()
            states_LD = states_LD + row.to_states(rest_LD, _NUM_ITERATIONS, is_time_up)
            found_LD = torch.zeros_like(gradient_LD)
            # Scored places stand last: they come first, should the time end.
            for place in reversed(range(num_places)):
                if place % _PLACES_BETWEEN_LOOKS == 0 and is_time_up():
                    break
                guess, found_LD[place] = self._match(
                    row, place, expected_LD[place], states_LD[place]
                )
                labels_L[place + 1], confidences_L[place + 1] = guess.token, guess.confidence
            rest = float((target_LD - row.from_states(found_LD).detach()).norm())
            if is_time_up() or rest < _EXPLAINED * float(target_LD.norm()):
                break
            # A place without a label keeps what was solved so far: the next round goes on there.
            is_found_L1 = (found_LD != 0).any(1, keepdim=True)
            states_LD = torch.where(is_found_L1, found_LD, states_LD)
        self._fill_sure(row, labels_L, confidences_L, last)
        is_finished = not is_time_up()
        return RowLabels(labels_L=labels_L, confidences_L=confidences_L, is_finished=is_finished)

    def _unclipped(self, row: TailRow, gradient_LD: Tensor, labels_L: Tensor) -> Tensor:
        if not self._is_clipped:
            return gradient_LD
        places_S = (labels_L[1:] >= 0).nonzero().squeeze(1)
        if not len(places_S):
            return gradient_LD
        clean_LD = row.of_labels(places_S, labels_L[places_S + 1])
        factors_L = clip_factors(self._rule, clean_LD).clamp_min(1e-3)
        return gradient_LD / factors_L[:, None]

    def _match(
        self, row: TailRow, place: int, expected_D: Tensor, state_D: Tensor
    ) -> tuple[LabelGuess, Tensor]:
        """The likeliest label at a place, or none, and the state that it explains."""
        candidates_K = self._shortlist(row, place, expected_D, state_D)
        states_KD = expected_D - row.label_states(place, candidates_K, self._readout)
        states_KD = states_KD * self._scales(states_KD, state_D)[:, None]
        squares_K = (states_KD - state_D).square().sum(1)
        width = len(state_D)
        empty = float(state_D.square().sum())
        variance = max(
            self._variance,
            min(empty, float(squares_K.min())) / width,
            (_ROUNDING * float(expected_D.norm())) ** 2 / width,
        )
        scores_K = row.log_probs_LV[place, candidates_K] - squares_K / (2 * variance)
        scores = torch.cat([scores_K, torch.tensor([-empty / (2 * variance)])])
        shares = torch.softmax(scores, 0)
        best = int(scores.argmax())
        confidence = min(1.0, float(shares[best]))
        if best == len(candidates_K):
            return LabelGuess(token=-1, confidence=confidence), torch.zeros_like(state_D)
        guess = LabelGuess(token=int(candidates_K[best]), confidence=confidence)
        return guess, states_KD[best]

    def _scales(self, states_KD: Tensor, state_D: Tensor) -> Tensor:
        """What a clip may have left of each candidate; 1 where nothing is clipped."""
        if not self._is_clipped:
            return torch.ones(len(states_KD))
        return (states_KD @ state_D / states_KD.square().sum(1).clamp_min(1e-38)).clamp(0.0, 1.5)

    def _shortlist(self, row: TailRow, place: int, expected_D: Tensor, state_D: Tensor) -> Tensor:
        """Likely tokens, and those whose state at this place is near the one solved for.

        A token's state is expected - J^T r_v; its squared length is taken as if the rows of J were
        orthogonal. Behind a clip only the direction counts.
        """
        log_probs_V = row.log_probs_LV[place]
        jacobian_DD = row.norm_jacobian(place)
        squares_V = self._readout.weighted_squares(jacobian_DD.square().sum(1)[None])[0]
        if self._is_clipped:
            along_V = state_D @ expected_D - self._products(jacobian_DD, state_D)
            lengths_V = expected_D.square().sum() + squares_V
            lengths_V = lengths_V - 2 * self._products(jacobian_DD, expected_D)
            near_V = along_V / lengths_V.clamp_min(1e-38).sqrt()
        else:
            near_V = 2 * self._products(jacobian_DD, expected_D - state_D) - squares_V
        num_near = min(_NUM_NEAR, len(near_V))
        num_likely = min(_NUM_LIKELY, len(near_V))
        chosen = [near_V.topk(num_near).indices, log_probs_V.topk(num_likely).indices]
        shortlist_K: Tensor = torch.cat(chosen).unique()
        return shortlist_K

    def _products(self, jacobian_DD: Tensor, state_D: Tensor) -> Tensor:
        """Every token's J^T r_v times a state, [V]."""
        return self._readout.correlated((jacobian_DD @ state_D)[None])[0]

    def _fill_sure(self, row: TailRow, labels_L: Tensor, confidences_L: Tensor, last: int) -> None:
        """Between scored places a vanished gradient means that the label was expected."""
        scored = (labels_L >= 0).nonzero().squeeze(1)
        if not len(scored) or self._variance > 0:
            return
        for index in range(int(scored[0]), min(last + 1, len(labels_L) - 1) + 1):
            log_prob, token = row.log_probs_LV[index - 1].max(0)
            if labels_L[index] < 0 and float(log_prob.exp()) > _SURE:
                labels_L[index], confidences_L[index] = token, log_prob.exp()


def _last_touched(gradient_LD: Tensor) -> int:
    """The last place with a gradient: what comes after it is not scored; -1 for none."""
    touched = gradient_LD.any(1).nonzero()
    return int(touched[-1]) if len(touched) else -1
