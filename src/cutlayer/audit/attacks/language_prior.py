"""The language prior alone: what a public model writes by itself, at the lengths that were seen.

It looks at no vector that left. Whatever another attack recovers beyond this, it has from the
evidence.

Shapes: B = rows of a batch, V = vocabulary.
"""

from collections.abc import Sequence

import torch

from cutlayer.audit.attack import ATTACKS, Aim, Effort, Guess
from cutlayer.audit.evidence import Evidence, Observation
from cutlayer.audit.knowledge import Knowledge
from cutlayer.model.kv_cache import RowCache
from cutlayer.model.rows import pack

__all__ = ["LanguagePrior"]

_ROWS = 32
"""Written together."""


@ATTACKS.register("language_prior")
class LanguagePrior:
    """Draws each row from the public model, token by token, from nothing but its length.

    The first token is drawn from the first tokens of public rows, where there are any; what the
    owner's prompt is known to end every row with is filled in.
    """

    aim = Aim.TOKENS
    about = "the public model's own text at the observed lengths; nothing that left is used"

    def reconstruct(self, evidence: Evidence, knowledge: Knowledge, effort: Effort) -> list[Guess]:
        """See `Attack`."""
        end_s = effort.clock_s() + effort.seconds
        # Rows of a length together: none waits for a longer one.
        waiting = sorted(evidence.observations, key=lambda seen: len(seen.h_LD))
        guesses: list[Guess] = []
        for begin in range(0, len(waiting), _ROWS):
            batch = waiting[begin : begin + _ROWS]
            generator = torch.Generator().manual_seed(effort.seed + begin)
            writer = _Writer(knowledge, [len(seen.h_LD) for seen in batch], generator)
            while effort.clock_s() < end_s and writer.step():
                pass
            rows = zip(batch, writer.tokens, writer.shares, strict=True)
            guesses += [_guess(*row, knowledge.template) for row in rows]
            effort.on_progress(min(1.0, (begin + _ROWS) / len(waiting)))
        return sorted(guesses, key=lambda guess: guess.number)


class _Writer:
    """One batch of rows being written."""

    def __init__(
        self, knowledge: Knowledge, lengths: Sequence[int], generator: torch.Generator
    ) -> None:
        self._knowledge, self._lengths, self._generator = knowledge, lengths, generator
        self.tokens: list[list[int]] = [[] for _ in lengths]
        self.shares: list[list[float]] = [[] for _ in lengths]
        head, tail = knowledge.parts
        self._parts = (head, knowledge.trunk, tail)
        self._caches = [
            [RowCache(len(part.block_range), length) for length in lengths] for part in self._parts
        ]

    @torch.inference_mode()
    def step(self) -> bool:
        """One more token of each row that is not done; False when all are."""
        open_rows = [n for n, length in enumerate(self._lengths) if len(self.tokens[n]) < length]
        if not open_rows:
            return False
        begun = bool(self.tokens[open_rows[0]])
        shares_BV = self._next(open_rows) if begun else self._first(len(open_rows))
        drawn = torch.multinomial(shares_BV, 1, generator=self._generator)[:, 0].tolist()
        for place, (row, token) in enumerate(zip(open_rows, drawn, strict=True)):
            self.tokens[row].append(token)
            self.shares[row].append(float(shares_BV[place, token]))
        return True

    def _first(self, num_rows: int) -> torch.Tensor:
        """Shares [B, V] of first tokens of public rows; all alike where there are none."""
        vocabulary = self._knowledge.embedding_VD.shape[0]
        firsts = [row[0] for row in self._knowledge.public_rows if row]
        counts_V = torch.bincount(torch.tensor(firsts or [0]), minlength=vocabulary).float()
        if not firsts:
            counts_V = torch.ones(vocabulary)
        return (counts_V / counts_V.sum()).expand(num_rows, -1)

    def _next(self, open_rows: Sequence[int]) -> torch.Tensor:
        past = [len(self.tokens[row]) - 1 for row in open_rows]
        rows = pack([self.tokens[row][-1:] for row in open_rows], past)
        head, trunk, tail = self._parts
        of_head, of_trunk, of_tail = ([caches[row] for row in open_rows] for caches in self._caches)
        y_ND = trunk(head(rows, of_head), rows.without_tokens(), of_trunk)
        logits_BV = tail(y_ND, rows.without_tokens(), of_tail)
        return torch.softmax(logits_BV.float(), dim=-1)


def _guess(
    seen: Observation, tokens: Sequence[int], shares: Sequence[float], template: Sequence[int]
) -> Guess:
    length = len(seen.h_LD)
    num_missing = length - len(tokens)
    said = [*tokens, *[-1] * num_missing]
    trust = [*shares, *[0.0] * num_missing]
    known = list(template)[-length:]
    if known:
        said[-len(known) :] = known
        trust[-len(known) :] = [1.0] * len(known)
    return Guess(
        number=seen.number,
        tokens=tuple(said),
        confidences=tuple(trust),
        num_unfinished=said.count(-1),
    )
