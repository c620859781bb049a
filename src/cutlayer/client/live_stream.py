"""A stream that has a row: its text so far and what chooses and guesses its next tokens.

It does not take turns (`decoder`).

Shapes: V = vocabulary.
"""

from dataclasses import dataclass, field

from torch import Tensor

from cutlayer.client.draft_length import DraftLength
from cutlayer.client.drafting import Draft, Drafter
from cutlayer.client.sampling import RowSampler
from cutlayer.client.streams import NewToken, Stream

__all__ = ["NO_DRAFT", "LiveStream", "new_token"]

NO_DRAFT = Draft(tokens=())
"""No guesses in a call."""


@dataclass(kw_only=True, eq=False)
class LiveStream:
    """What the decoder keeps of it."""

    stream: Stream
    row: int
    tokens: list[int]
    """Prompt and reply."""
    sampler: RowSampler
    drafter: Drafter
    draft_length: DraftLength
    draft: Draft = field(default=NO_DRAFT)
    """What is guessed in the call under way."""
    ready_s: float = 0.0
    """Not to be tried again before."""
    give_up_s: float | None = None
    """When it stops asking for room."""


def new_token(token: int, logits_V: Tensor, num_top: int | None) -> NewToken:
    """What a watcher is told; `num_top` as in `Request`, `logits_V` at the token's place."""
    if num_top is None:
        return NewToken(token=token)
    logprobs_V = logits_V.detach().float().log_softmax(dim=-1)
    best = logprobs_V.topk(num_top)
    top = tuple(zip(best.indices.tolist(), best.values.tolist(), strict=True))
    return NewToken(token=token, logprob=float(logprobs_V[token]), top=top)
