"""Guesses by a small local model of the same vocabulary.

It does not load models (`draft_model_file`) or verify guesses (`verification`).

Shapes: V = vocabulary, K = drafted tokens.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from cutlayer.client.draft_protocol import Draft, NextTokenModel
from cutlayer.client.sampling import RowSampler
from cutlayer.client.settings import SamplingSettings

__all__ = ["ModelDrafter"]

_PREFILL_TOKENS = 256
"""Prompt tokens that one call of `propose` reads at most: the streams beside it wait for it."""


class ModelDrafter:
    """Draws as the stream itself does, from the small model's distributions."""

    def __init__(
        self,
        model: NextTokenModel,
        sampling: SamplingSettings,
        draw: int,
        least_confidence: float,
    ) -> None:
        """Start with nothing read.

        Args:
            model: a row of its own.
            sampling: of the stream; greedy streams get the likeliest tokens.
            draw: as in `DraftWorld`.
            least_confidence: as in `DraftWorld`.
        """
        self._model = model
        self._least_confidence = least_confidence
        self._draws = sampling.temperature > 0
        # Its draws must be independent of those of verification, or the rule would be biased.
        self._sampler = RowSampler(sampling, -1 - draw)
        self._fed: list[int] = []
        self._num_known = 0
        """Tokens that both the model and the stream had at the last call."""

    def propose(self, tokens: Sequence[int], num_tokens: int) -> Draft:
        """Catch up with the stream, then go on alone; see `Drafter`."""
        room = self._model.context_length - len(tokens)
        if not self._catch_up(tokens) or num_tokens < 1 or room < 1:
            return Draft(())
        return self._continue(list(tokens), min(num_tokens, room))

    def close(self) -> None:
        """Let the cache go."""
        self._model.truncate(0)
        self._fed.clear()

    def _catch_up(self, tokens: Sequence[int]) -> bool:
        """Whether all but the last token are fed; a long prompt takes several calls."""
        if len(tokens) > self._model.context_length:
            return False
        known = min(self._num_known, len(tokens) - 1)
        while known < min(len(self._fed), len(tokens) - 1) and self._fed[known] == tokens[known]:
            known += 1
        self._truncate(known)
        end = min(len(tokens) - 1, known + _PREFILL_TOKENS)
        if end > known:
            self._feed([tokens[place] for place in range(known, end)])
        self._num_known = end
        return end == len(tokens) - 1

    def _continue(self, seen: list[int], num_tokens: int) -> Draft:
        start, probabilities = len(seen), []
        while len(seen) < start + num_tokens:
            logits_V = self._feed(seen[-1:])
            p_V = self._sampler.probabilities(logits_V, seen)
            # Decided before the draw: a token that is kept for its own sake would be biased.
            if float(torch.softmax(logits_V.float(), -1).max()) < self._least_confidence:
                break
            seen.append(self._sampler.draw(p_V))
            probabilities.append(p_V)
        if not probabilities or not self._draws:
            return Draft(tuple(seen[start:]))
        return Draft(tuple(seen[start:]), torch.stack(probabilities))

    def _feed(self, tokens: list[int]) -> Tensor:
        self._fed += tokens
        return self._model.extend(tokens)

    def _truncate(self, length: int) -> None:
        if length < len(self._fed):
            del self._fed[length:]
            self._model.truncate(length)
