"""How likely each next token is before its vector is looked at: a language model, or counts.

It never sees released vectors. The language model is the public one as the attacker has it, run on
head states that the search has computed already.

Shapes: V = vocabulary, W = hypotheses, M = kept nodes, D = hidden size.
"""

import math
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from cutlayer.audit.knowledge import Knowledge
from cutlayer.audit.token_tree import TokenTree

__all__ = ["CountPrior", "LanguagePrior", "Prior", "count_log_probs"]

_SMOOTHING = 0.05
"""Share of the counts in a mixture with the language model: it may be sure, and wrong."""
_PSEUDO_COUNT = 0.1
"""Of tokens that public text does not show."""


class Prior(Protocol):
    """One row's next-token distributions."""

    def first(self) -> Tensor:
        """Log-probabilities [V] of the first token."""

    def follow(self, h_WD: Tensor, seen_WM: Tensor, depth: int) -> Tensor:
        """Log-probabilities [W, V] behind each hypothesis, whose newest states these are."""

    def select(self, nodes_M: Tensor) -> None:
        """Forget all nodes but these."""


def count_log_probs(rows: Sequence[Sequence[int]], vocabulary: int) -> Tensor:
    """Log-frequencies [V] of tokens in public rows, smoothed; equal ones without rows."""
    tokens = torch.tensor([token for row in rows for token in row], dtype=torch.int64)
    counts_V = torch.bincount(tokens, minlength=vocabulary)[:vocabulary].double() + _PSEUDO_COUNT
    return (counts_V / counts_V.sum()).log().float()


class CountPrior:
    """The same distribution everywhere: where vectors decide alone."""

    def __init__(self, counts_V: Tensor) -> None:
        self._counts_V = counts_V

    def first(self) -> Tensor:
        """The counts."""
        return self._counts_V

    def follow(self, h_WD: Tensor, seen_WM: Tensor, depth: int) -> Tensor:
        """The counts, whatever the past."""
        return self._counts_V.expand(h_WD.shape[0], -1)

    def select(self, nodes_M: Tensor) -> None:
        """Nothing is kept."""


class LanguagePrior:
    """The public model behind the head; made anew for each row."""

    def __init__(self, knowledge: Knowledge, counts_V: Tensor) -> None:
        """
        Args:
            knowledge: trunk and tail are used as the attacker has them.
            counts_V: log-probabilities of single tokens, from `count_log_probs`.
        """
        self._tail = knowledge.parts[1]
        self._trees = TokenTree(knowledge.trunk), TokenTree(self._tail)
        self._counts_V = counts_V
        self._floor_V = counts_V + math.log(_SMOOTHING)

    def first(self) -> Tensor:
        """The counts: the model has nothing to go by."""
        return self._counts_V

    @torch.no_grad()
    def follow(self, h_WD: Tensor, seen_WM: Tensor, depth: int) -> Tensor:
        """The model's own distribution, mixed with the counts."""
        states_WD, everyone = h_WD, torch.arange(h_WD.shape[0])
        for tree in self._trees:
            states_WD = tree.run(states_WD, seen_WM, depth)
            tree.keep(everyone)
        log_probs_WV = self._tail.logits(states_WD).float()[:, : len(self._counts_V)]
        log_probs_WV = log_probs_WV.log_softmax(1) + math.log1p(-_SMOOTHING)
        return torch.logaddexp(log_probs_WV, self._floor_V)

    def select(self, nodes_M: Tensor) -> None:
        """See `Prior`."""
        for tree in self._trees:
            tree.select(nodes_M)
