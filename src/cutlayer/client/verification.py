"""Which drafted tokens stand: the model's own distribution decides, and none is changed by it.

It does not draft (`drafting`) or run the model. What comes out is distributed exactly as plain
sampling; greedy and equality-checked drafts give the very tokens of plain decoding.

Source: Leviathan et al., arXiv 2211.17192, algorithm 1; Chen et al., arXiv 2302.01318.

Shapes: V = vocabulary, K = drafted tokens.
"""

from collections.abc import Sequence

from torch import Tensor

from cutlayer.client.draft_protocol import Draft
from cutlayer.client.sampling import RowSampler

__all__ = ["verify"]


def verify(logits_KV: Tensor, draft: Draft, sampler: RowSampler, seen: Sequence[int]) -> list[int]:
    """The accepted drafts, followed by one further token of the model itself.

    Args:
        logits_KV: logits [K + 1, V] at the places of the drafts and after the last of them.
        draft: what was guessed.
        sampler: of the stream; where nothing was drawn for the draft, it draws what plain decoding
            would have drawn.
        seen: prompt and reply so far, for the repetition penalty.
    """
    assert len(logits_KV) == len(draft.tokens) + 1, (logits_KV.shape, len(draft.tokens))
    if draft.probabilities_KV is None:
        return _verify_equal(logits_KV, draft.tokens, sampler, seen)
    assert draft.probabilities_KV.shape == logits_KV[:-1].shape, draft.probabilities_KV.shape
    return _verify_drawn(logits_KV, draft.tokens, draft.probabilities_KV, sampler, list(seen))


def _verify_equal(
    logits_KV: Tensor, drafts: Sequence[int], sampler: RowSampler, seen: Sequence[int]
) -> list[int]:
    if sampler.takes_largest:
        chosen = logits_KV.argmax(-1).tolist()
        right = [ours == theirs for ours, theirs in zip(chosen, drafts, strict=False)]
        return chosen[: 1 + (right.index(False) if False in right else len(right))]
    chosen, text = [], list(seen)
    for logits_V, draft in zip(logits_KV, [*drafts, None], strict=True):
        chosen.append(sampler.next_token(logits_V, text))
        if chosen[-1] != draft:
            break
        text.append(chosen[-1])
    return chosen


def _verify_drawn(
    logits_KV: Tensor,
    drafts: Sequence[int],
    probabilities_KV: Tensor,
    sampler: RowSampler,
    text: list[int],
) -> list[int]:
    accepted: list[int] = []
    for logits_V, token, q_V in zip(logits_KV, drafts, probabilities_KV, strict=False):
        p_V = sampler.probabilities(logits_V, text)
        if not sampler.accepts(float(p_V[token]), float(q_V[token])):
            return [*accepted, sampler.draw(_residual(p_V, q_V))]
        accepted.append(token)
        text.append(token)
    return [*accepted, sampler.next_token(logits_KV[-1], text)]


def _residual(p_V: Tensor, q_V: Tensor) -> Tensor:
    """What the model gives more than the drafter: max(0, p - q), normalised."""
    left_V = (p_V - q_V.to(p_V)).clamp_min(0)
    total = left_V.sum()
    # Equal up to rounding: a rejection is then rounding too, and p itself is right.
    return left_V / total if float(total) > 0 else p_V
