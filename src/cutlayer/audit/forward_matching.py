"""From guessed tokens to better ones: input embeddings are moved until the head's output fits.

It does not find a start (`gradient_rows`) and keeps it where moving does not pay.

Shapes: L = vectors of one row, D = hidden size, V = vocabulary.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from cutlayer.audit.evidence import Observation
from cutlayer.audit.knowledge import Knowledge
from cutlayer.audit.tail_gradients import Silence
from cutlayer.model.rows import Rows

__all__ = ["refine"]

_NUM_STEPS = 64
_STEP_SHARE = 0.3
"""Learning rate as a share of the embedding's standard deviation."""


def refine(
    knowledge: Knowledge,
    observation: Observation,
    tokens_L: Tensor,
    is_time_up: Callable[[], bool],
) -> Tensor:
    """Tokens whose head output is at least as near to the released vectors as the start's.

    Args:
        knowledge: the head and what was done to its output.
        observation: the row.
        tokens_L: where to start; places with -1 stay unknown, and nothing is then moved.
        is_time_up: asked before each step.

    Source: BiSR (arXiv 2409.00960, section 4.4): cosine distance between h and the head's output
        of free input embeddings, then the nearest embedding row.
    """
    if bool((tokens_L < 0).any()) or observation.start > 0 or is_time_up():
        return tokens_L
    match = _ForwardMatch(knowledge, observation)
    moved_LD = match.moved(tokens_L, is_time_up)
    found_L = _nearest(moved_LD, knowledge.embedding_VD)
    best_L, best = tokens_L, match.distance_of(tokens_L)
    for candidate_L in (found_L, *_single_changes(tokens_L, found_L)):
        if is_time_up():
            break
        distance = match.distance_of(candidate_L)
        if distance < best:
            best_L, best = candidate_L, distance
    return best_L


class _ForwardMatch:
    """One row's released vectors, and how far a guess is from them."""

    def __init__(self, knowledge: Knowledge, observation: Observation) -> None:
        self._head = knowledge.parts[0]
        self._embed: nn.Module = self._head.base.get_input_embeddings()
        self._rule = knowledge.rule
        self._h_LD = observation.h_LD
        # What was withheld says nothing.
        self._seen_L = ~(observation.h_LD == 0).all(1)
        self._rows = Rows(lengths=(len(observation.h_LD),))

    def distance(self, embedded_LD: Tensor) -> Tensor:
        """Mean over visible places of 1 - cosine, after the rule's clip."""
        h_LD = self._head.run_blocks(embedded_LD, self._rows)
        h_LD = self._rule.apply(h_LD, Silence(self._rows.lengths))
        cosine_L = torch.cosine_similarity(h_LD, self._h_LD, dim=1)
        mean: Tensor = (1 - cosine_L)[self._seen_L].mean()
        return mean

    def distance_of(self, tokens_L: Tensor) -> float:
        """The same for tokens."""
        with torch.no_grad():
            return float(self.distance(self._embed(tokens_L)))

    def moved(self, tokens_L: Tensor, is_time_up: Callable[[], bool]) -> Tensor:
        """The tokens' embeddings after some steps of AdamW."""
        moved_LD = self._embed(tokens_L).detach().clone().requires_grad_()
        rate = _STEP_SHARE * float(moved_LD.detach().std())
        optimizer = torch.optim.AdamW([moved_LD], lr=rate, weight_decay=0.0)
        for _ in range(_NUM_STEPS):
            if is_time_up():
                break
            optimizer.zero_grad()
            (moved_LD.grad,) = torch.autograd.grad(self.distance(moved_LD), [moved_LD])
            optimizer.step()
        result_LD: Tensor = moved_LD.detach()
        return result_LD


def _nearest(moved_LD: Tensor, embedding_VD: Tensor) -> Tensor:
    """The row of the embedding with the largest cosine, per place."""
    directions_VD = torch.nn.functional.normalize(embedding_VD, dim=1)
    nearest_L: Tensor = (moved_LD @ directions_VD.T).argmax(1)
    return nearest_L


def _single_changes(tokens_L: Tensor, found_L: Tensor) -> list[Tensor]:
    """The start with one place changed, for each place where the two differ."""
    changes = []
    for place in (tokens_L != found_L).nonzero().squeeze(1):
        changed_L = tokens_L.clone()
        changed_L[place] = found_L[place]
        changes.append(changed_L)
    return changes
