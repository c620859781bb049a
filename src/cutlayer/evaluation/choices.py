"""Log-likelihood of each choice of an item, its context fed once.

It does not batch (`passes`) nor decide what a score means (`run`).

Shapes: K = positions of one pass, V = vocabulary.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from cutlayer.evaluation.passes import Pass, RowPasses
from cutlayer.evaluation.rows import ChoiceRow

__all__ = ["ChoiceScores"]

_Tokens = tuple[int, ...]


class ChoiceScores:
    """One item: what to feed, and the log-likelihoods once that has been done.

    A choice's last token is never fed. Choices are fed in the order of their tokens, each from
    where it parts from the one before, so no beginning leaves the owner twice.
    """

    def __init__(self, row: ChoiceRow) -> None:
        self.row = row
        # Per beginning of a choice: the tokens that some choice has next, and what they cost.
        self._next: dict[_Tokens, set[int]] = {}
        for choice in row.choices:
            for num in range(len(choice)):
                self._next.setdefault(choice[:num], set()).add(choice[num])
        self._log_probs: dict[tuple[_Tokens, int], float] = {}

    @property
    def log_likelihoods(self) -> list[float]:
        """Per choice the sum of its tokens' log-probabilities after the context, in nats."""
        return [
            sum(self._log_probs[choice[:num], token] for num, token in enumerate(choice))
            for choice in self.row.choices
        ]

    @property
    def num_fed(self) -> int:
        """Tokens that go through the model: the context, and every beginning of a choice once."""
        return len(self.row.context) + len(self._next) - 1

    def work(self) -> RowPasses:
        """What to feed."""
        return RowPasses(max_length=self.row.num_tokens, passes=self._passes())

    def _passes(self) -> list[Pass]:
        context, passes = self.row.context, list[Pass]()
        fed: _Tokens = ()
        for path in _longest([choice[:-1] for choice in self.row.choices]):
            common = _num_common(fed, path)
            if not passes:
                # The context's last position gives every choice's first token.
                tokens, keep, num_wanted = context + path, 0, len(path) + 1
            else:
                tokens, keep = path[common:], len(context) + common
                num_wanted = len(tokens)
            passes.append(self._pass(path, keep, tokens, num_wanted))
            fed = path
        return passes

    def _pass(self, path: _Tokens, keep: int, tokens: _Tokens, num_wanted: int) -> Pass:
        first_length = len(path) - num_wanted + 1

        def deliver(first: int, logits_KV: Tensor) -> None:
            for number, logits_V in enumerate(logits_KV, first_length + first):
                self._take(path[:number], logits_V)

        return Pass(keep=keep, tokens=tokens, num_wanted=num_wanted, deliver=deliver)

    def _take(self, beginning: _Tokens, logits_V: Tensor) -> None:
        wanted = sorted(self._next.get(beginning, ()))
        log_probs_V = torch.log_softmax(logits_V.detach().float(), dim=-1)
        for token in wanted:
            self._log_probs[beginning, token] = float(log_probs_V[token])


def _longest(paths: Sequence[_Tokens]) -> list[_Tokens]:
    """In ascending order, without those that only begin another."""
    ordered = sorted(set(paths))
    return [
        path
        for path, after in zip(ordered, [*ordered[1:], None], strict=True)
        if after is None or after[: len(path)] != path
    ]


def _num_common(first: _Tokens, second: _Tokens) -> int:
    common = 0
    for a, b in zip(first, second, strict=False):
        if a != b:
            break
        common += 1
    return common
