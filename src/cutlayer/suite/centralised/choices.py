"""Log-likelihoods of choices; which is right it does not know.

Shapes: B = rows, S = length, L = positions whose logits are wanted, V = vocabulary.
"""

from collections.abc import Iterator, Sequence

import torch
from peft import PeftModel
from transformers import PreTrainedModel

from .tokens import Asked, batches, inputs, padded

__all__ = ["score_choices"]


def score_choices(
    model: PreTrainedModel | PeftModel, base: PreTrainedModel, asked: Sequence[Asked]
) -> dict[int, list[float]]:
    """Sum of log-probabilities of each choice's tokens, by the item's number."""
    numbers = [number for number, item in enumerate(asked) if item.choices]
    is_short = {n: all(len(choice) == 1 for choice in asked[n].choices) for n in numbers}
    scores = {n: _score_long(model, base, asked[n]) for n in numbers if not is_short[n]}
    for batch in batches(asked, [n for n in numbers if is_short[n]]):
        scores |= zip(batch, _score_short(model, [asked[n] for n in batch]), strict=True)
    return scores


def _score_short(
    model: PreTrainedModel | PeftModel, asked: Sequence[Asked]
) -> Iterator[list[float]]:
    """Choices of one token each: the context alone is fed, of several items at once."""
    lasts = torch.tensor([len(item.context) - 1 for item in asked])
    wanted_L, places = lasts.unique(return_inverse=True)
    fed = inputs([item.context for item in asked])
    logits_BLV = model(**fed, use_cache=False, logits_to_keep=wanted_L).logits
    for item, logits_LV, place in zip(asked, logits_BLV, places.tolist(), strict=True):
        log_probs_V = logits_LV[place].float().log_softmax(dim=-1)
        yield [float(log_probs_V[choice[0]]) for choice in item.choices]


def _score_long(
    model: PreTrainedModel | PeftModel, base: PreTrainedModel, item: Asked
) -> list[float]:
    """Choices of several tokens: the context is fed once and its cache used for all of them.

    `base` has the adapter in it, and takes a cache that already begins with a prefix.
    """
    context_1S = torch.tensor([item.context])
    output = model(context_1S, use_cache=True, logits_to_keep=1)
    firsts_V = output.logits[0, -1].float().log_softmax(dim=-1)
    cache = output.past_key_values
    cache.batch_repeat_interleave(len(item.choices))
    # A choice's last token is never fed; a choice of one token feeds padding.
    fed_BS = padded([choice[:-1] for choice in item.choices], 0)
    logits_BSV = base(fed_BS, past_key_values=cache, use_cache=True).logits
    log_probs_BSV = logits_BSV.float().log_softmax(dim=-1)
    return [
        float(firsts_V[choice[0]])
        + sum(float(log_probs_SV[n, token]) for n, token in enumerate(choice[1:]))
        for choice, log_probs_SV in zip(item.choices, log_probs_BSV, strict=True)
    ]
