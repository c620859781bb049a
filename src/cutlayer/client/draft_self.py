"""Guesses by the owner's own parts: head, draft adapter and tail, without the trunk.

It does not train the adapter (`draft_adapter`) or hold caches (`session`). Nothing is sent.
Source of drafting by a model's own outer layers: Zhang et al., Draft & Verify, arXiv 2309.08168.

Shapes: V = vocabulary.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from cutlayer.client.draft_protocol import Draft
from cutlayer.client.sampling import RowSampler
from cutlayer.client.settings import SamplingSettings

__all__ = ["SelfDrafter"]


class SelfDrafter:
    """The likeliest tokens, one after the other; nothing is drawn."""

    def __init__(
        self,
        guess: Callable[[int], Tensor],
        forget: Callable[[], None],
        sampling: SamplingSettings,
        least_confidence: float,
    ) -> None:
        """See `DraftWorld`; of `sampling` the repetition penalty is used."""
        self._guess = guess
        self._least_confidence = least_confidence
        self._forget = forget
        greedy = SamplingSettings(repetition_penalty=sampling.repetition_penalty)
        self._sampler = RowSampler(greedy, row=0)

    def propose(self, tokens: Sequence[int], num_tokens: int) -> Draft:
        """Guess until one is doubtful; see `Drafter`."""
        seen = list(tokens)
        try:
            while len(seen) < len(tokens) + num_tokens:
                logits_V = self._guess(seen[-1])
                token = self._sampler.next_token(logits_V, seen)
                if _probability(logits_V, token) < self._least_confidence:
                    break
                seen.append(token)
        finally:
            self._forget()
        return Draft(tuple(seen[len(tokens) :]))

    def close(self) -> None:
        """The session owns the caches."""


def _probability(logits_V: Tensor, token: int) -> float:
    scores_V = logits_V.float()
    return float((scores_V[token] - torch.logsumexp(scores_V, dim=-1)).exp())
