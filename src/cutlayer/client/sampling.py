"""From logits to the next token. It runs at the client and knows no text and no network.

Shapes: V = vocabulary. Source of min-p: Nguyen et al., arXiv 2407.01082; of top-p: Holtzman et al.,
arXiv 1904.09751; of the repetition penalty: Keskar et al., arXiv 1909.05858, section 4.1.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from cutlayer.client.settings import SamplingSettings

__all__ = ["RowSampler", "next_tokens"]

_COLDEST = 1e-6
_FEW = 256
"""Likeliest tokens among which top-p usually ends."""
_ROUNDING = 1e-5
"""Of a sum of float32 probabilities, at most."""


class RowSampler:
    """Chooses the tokens of one row; the same seed and logits give the same tokens."""

    def __init__(self, settings: SamplingSettings, row: int) -> None:
        self._settings = settings
        self._generator = torch.Generator().manual_seed((settings.seed * 1_000_003 + row) % 2**63)

    def next_token(self, logits_V: Tensor, seen: Sequence[int]) -> int:
        """The next token id.

        Args:
            logits_V: logits of the last position.
            seen: prompt and reply so far, for the repetition penalty.
        """
        if self._settings.temperature == 0.0:
            return int(self._penalised(logits_V, seen).argmax())
        return self.draw(self.probabilities(logits_V, seen))

    @property
    def takes_largest(self) -> bool:
        """Whether it chooses the largest logit, whatever was seen before."""
        return self._settings.temperature == 0.0 and self._settings.repetition_penalty == 1.0

    def probabilities(self, logits_V: Tensor, seen: Sequence[int]) -> Tensor:
        """The distribution [V] that `next_token` draws from; greedy: 1 at its choice.

        Args:
            logits_V: logits of the last position.
            seen: prompt and reply so far, for the repetition penalty.
        """
        settings = self._settings
        scores_V = self._penalised(logits_V, seen)
        if settings.temperature == 0.0:
            return torch.zeros_like(scores_V).index_fill_(0, scores_V.argmax(), 1.0)
        # The largest score becomes 0, so that no temperature can make it overflow.
        scores_V = (scores_V - scores_V.max()) / max(settings.temperature, _COLDEST)
        if settings.top_k is not None:
            scores_V = _top_k(scores_V, settings.top_k)
        if settings.top_p is not None:
            scores_V = _top_p(scores_V, settings.top_p)
        if settings.min_p is not None:
            scores_V = _min_p(scores_V, settings.min_p)
        return torch.softmax(scores_V, dim=-1)

    def draw(self, p_V: Tensor) -> int:
        """A token of this distribution; advances the generator."""
        return int(torch.multinomial(p_V, 1, generator=self._generator))

    def accepts(self, p: float, q: float) -> bool:
        """True with probability min(1, p / q); advances the generator."""
        return float(torch.rand((), dtype=torch.float64, generator=self._generator)) * q < p

    def _penalised(self, logits_V: Tensor, seen: Sequence[int]) -> Tensor:
        scores_V = logits_V.detach().float().cpu()
        if self._settings.repetition_penalty == 1.0:
            return scores_V
        return _penalised(scores_V, seen, self._settings.repetition_penalty)


def next_tokens(
    samplers: Sequence[RowSampler], logits_BV: Tensor, seen: Sequence[Sequence[int]]
) -> list[int]:
    """The next token of each of B rows; all greedy ones are chosen in one go.

    Args:
        samplers: one per row.
        logits_BV: logits of the last position of each.
        seen: per row its prompt and reply so far.
    """
    largest_B = logits_BV.detach().argmax(-1).tolist()
    return [
        largest if sampler.takes_largest else sampler.next_token(logits_V, text)
        for sampler, largest, logits_V, text in zip(
            samplers, largest_B, logits_BV, seen, strict=True
        )
    ]


def _penalised(scores_V: Tensor, seen: Sequence[int], penalty: float) -> Tensor:
    ids = torch.tensor(sorted(set(seen)), dtype=torch.int64)
    chosen = scores_V[ids]
    penalised_V = scores_V.clone()
    penalised_V[ids] = torch.where(chosen > 0, chosen / penalty, chosen * penalty)
    return penalised_V


def _top_k(scores_V: Tensor, k: int) -> Tensor:
    smallest_kept = torch.topk(scores_V, min(k, scores_V.shape[-1])).values[-1]
    return scores_V.masked_fill(scores_V < smallest_kept, -torch.inf)


def _top_p(scores_V: Tensor, p: float) -> Tensor:
    few = min(_FEW, scores_V.shape[-1])
    likeliest = torch.topk(torch.softmax(scores_V, dim=-1), few)
    if few < scores_V.shape[-1] and float(likeliest.values.sum()) >= p + _ROUNDING:
        # Everything else is cut anyway; to sort all of a vocabulary takes 20 times as long.
        kept_K = likeliest.indices[likeliest.values.cumsum(-1) - likeliest.values < p]
        return torch.full_like(scores_V, -torch.inf).scatter(0, kept_K, scores_V[kept_K])
    sorted_V, order_V = torch.sort(scores_V, descending=True)
    probabilities_V = torch.softmax(sorted_V, dim=-1)
    # What comes before a token decides: the one that crosses p is still kept.
    is_cut_V = probabilities_V.cumsum(-1) - probabilities_V >= p
    return scores_V.masked_fill(
        torch.zeros_like(is_cut_V).scatter(0, order_V, is_cut_V), -torch.inf
    )


def _min_p(scores_V: Tensor, p: float) -> Tensor:
    probabilities_V = torch.softmax(scores_V, dim=-1)
    return scores_V.masked_fill(probabilities_V < p * probabilities_V.max(), -torch.inf)
