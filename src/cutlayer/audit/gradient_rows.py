"""Gradient matching over the rows of a recording, within a time limit.

It does not fit inverters nor match smashed data (`attacks`).

Shapes: L = vectors of one row, S = scored places, D = hidden size, V = vocabulary.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from cutlayer.audit.attack import LATE, Effort, Guess
from cutlayer.audit.evidence import Evidence, Observation
from cutlayer.audit.gradient_matching import match_gradient, with_gradients
from cutlayer.audit.knowledge import Knowledge
from cutlayer.audit.tail_gradients import TailRow
from cutlayer.audit.tail_labels import LabelReader

__all__ = ["GradientRows", "MatchedRow"]

_NUM_STEPS = 60
_LEAST_LOG_PROB = -10.0
"""An inverter that is sure may still be wrong: what it rules out stays within reach."""


@dataclass(frozen=True, kw_only=True)
class MatchedRow:
    """Tokens of one row; -1 where nothing is known."""

    tokens_L: Tensor = field(repr=False)
    confidences_L: Tensor = field(repr=False)
    is_finished: bool = True
    """Whether time did not end it."""

    def guess(self, observation: Observation) -> Guess:
        """As attacks answer."""
        return Guess(
            number=observation.number,
            tokens=tuple(int(token) for token in self.tokens_L),
            confidences=tuple(min(1.0, float(c)) for c in self.confidences_L),
            num_unfinished=0 if self.is_finished else len(self.tokens_L),
        )


class GradientRows:
    """Everything that the rows of one attack share."""

    def __init__(
        self, evidence: Evidence, knowledge: Knowledge, seconds: float, effort: Effort
    ) -> None:
        """
        Args:
            evidence: with replies and gradients.
            knowledge: the tail and the rule of the gradients.
            seconds: for all rows; those past it keep what they start from, and those far past it
                say nothing.
            effort: clock and progress.

        Raises:
            ConfigError: no observation has both a reply and a gradient.
        """
        self._observations = with_gradients(evidence)
        self._tail = knowledge.parts[1]
        self._rule = knowledge.gradient_rule
        self._reader = LabelReader(self._tail, self._rule)
        self._effort = effort
        begin_s = effort.clock_s()
        self._end_s, self._late_s = begin_s + seconds, begin_s + LATE * seconds

    def matched(
        self, start_LV: Callable[[Observation], Tensor | None], done: float
    ) -> Iterator[tuple[Observation, MatchedRow]]:
        """Every row with its scored tokens found from the gradient.

        Args:
            start_LV: log probabilities of the token at each vector from elsewhere, or None: then
                the tail's own prediction is the start, and tokens that are not scored stay unknown.
            done: share of the attack's work that lies behind.
        """
        for number, (observation, y_LD, gradient_LD) in enumerate(self._observations):
            is_late = self._effort.clock_s() >= self._late_s
            start = None if is_late else start_LV(observation)
            yield observation, self._match(y_LD, gradient_LD, start)
            share = (number + 1) / len(self._observations)
            self._effort.on_progress(done + (1 - done) * share)

    def _match(self, y_LD: Tensor, gradient_LD: Tensor, start_LV: Tensor | None) -> MatchedRow:
        tokens_L = torch.full((len(y_LD),), -1)
        confidences_L = torch.zeros(len(y_LD))
        if start_LV is not None:
            confidences_L, tokens_L = (x_L.clone() for x_L in start_LV.max(1))
            confidences_L = confidences_L.exp()
        if self._is_time_up():
            return MatchedRow(tokens_L=tokens_L, confidences_L=confidences_L, is_finished=False)
        row = TailRow(self._tail, y_LD)
        scored_L = self._reader.read(row, gradient_LD, self._is_time_up).labels_L >= 0
        places_S = scored_L.nonzero().squeeze(1) - 1
        if len(places_S):
            start_SV = row.log_probs_LV[places_S]
            if start_LV is not None:
                # Two witnesses: what the vector at a place looks like, and what the tail expects.
                start_SV = start_SV + start_LV[places_S + 1].clamp_min(_LEAST_LOG_PROB)
            found_SV = match_gradient(
                row, gradient_LD, self._rule, places_S, start_SV, _NUM_STEPS, self._is_time_up
            )
            best = found_SV.max(1)
            tokens_L[places_S + 1] = best.indices
            confidences_L[places_S + 1] = best.values.exp()
        return MatchedRow(
            tokens_L=tokens_L,
            confidences_L=confidences_L,
            is_finished=not self._is_time_up(),
        )

    def _is_time_up(self) -> bool:
        return self._effort.clock_s() >= self._end_s
