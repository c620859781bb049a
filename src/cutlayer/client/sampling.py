"""From logits to the next token. It runs at the client and knows no text and no network.

Shapes: V = vocabulary. Source of min-p: Nguyen et al., arXiv 2407.01082; of top-p: Holtzman et al.,
arXiv 1904.09751; of the repetition penalty: Keskar et al., arXiv 1909.05858, section 4.1.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from cutlayer.client.settings import SamplingSettings

__all__ = ["RowSampler"]

_COLDEST = 1e-6


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
        settings = self._settings
        scores_V = logits_V.detach().float().cpu()
        if settings.repetition_penalty != 1.0:
            scores_V = _penalised(scores_V, seen, settings.repetition_penalty)
        if settings.temperature == 0.0:
            return int(scores_V.argmax())
        # The largest score becomes 0, so that no temperature can make it overflow.
        scores_V = (scores_V - scores_V.max()) / max(settings.temperature, _COLDEST)
        if settings.top_k is not None:
            scores_V = _top_k(scores_V, settings.top_k)
        if settings.top_p is not None:
            scores_V = _top_p(scores_V, settings.top_p)
        if settings.min_p is not None:
            scores_V = _min_p(scores_V, settings.min_p)
        probabilities_V = torch.softmax(scores_V, dim=-1)
        return int(torch.multinomial(probabilities_V, 1, generator=self._generator))


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
