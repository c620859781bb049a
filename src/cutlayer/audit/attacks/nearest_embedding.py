"""Nearest row of the public embedding: all that is needed where the head has no block.

Behind blocks it is a baseline: it does not undo them.

Shapes: L = vectors of one row, D = hidden size, V = vocabulary.
"""

import torch
from torch import Tensor

from cutlayer.audit.attack import ATTACKS, Aim, Effort, Guess
from cutlayer.audit.chains import chains, guesses_of, known_places, nothing_of
from cutlayer.audit.embedding_rows import nearest_rows
from cutlayer.audit.evidence import Evidence
from cutlayer.audit.knowledge import Knowledge
from cutlayer.audit.known_noise import known_noise
from cutlayer.audit.matching import Deadline
from cutlayer.audit.token_tree import TokenTree
from cutlayer.model.checkpoint import load_part
from cutlayer.model.partition import Cut, Head, Part

__all__ = ["NearestEmbedding"]


@ATTACKS.register("nearest_embedding")
class NearestEmbedding:
    """Compares each vector with every row of the embedding, after the clip that the rule has.

    The rows are those that a head without blocks would release: multipliers included, and at each
    place with that place's position vector where the model adds one.
    """

    aim = Aim.TOKENS
    about = "nearest row of the public embedding; breaks a head without blocks"

    @torch.no_grad()
    def reconstruct(self, evidence: Evidence, knowledge: Knowledge, effort: Effort) -> list[Guess]:
        """See `Attack`."""
        left_s = Deadline(effort)
        head = load_part(knowledge.folder, Cut(0, 1), Part.HEAD)
        assert isinstance(head, Head)
        rows_VD = _states(head, torch.arange(len(knowledge.embedding_VD)), depth=0)
        noise = known_noise(knowledge.rule, rows_VD.shape[1])
        seen = chains(evidence.observations)
        guesses: list[Guess] = []
        for index, chain in enumerate(seen):
            if left_s() <= 0:
                guesses += nothing_of(chain)
                continue
            norms_L = rows_VD.square().sum(1).mean().double().expand(chain.length)
            factor = noise.row_factor(norms_L)
            x_LD = chain.h_LD - _shifts(head, chain.pieces[0].start, chain.length) * factor
            tokens, shares = nearest_rows(x_LD, noise.clipped(rows_VD, factor))
            for place, token in known_places(chain, knowledge.template).items():
                tokens[place] = token
            guesses += guesses_of(chain, tokens, shares)
            effort.on_progress((index + 1) / len(seen))
        return guesses


def _states(head: Head, tokens_K: Tensor, depth: int) -> Tensor:
    nothing = torch.zeros(1, 0, dtype=torch.bool)
    pieces = [
        TokenTree(head).run(piece_K, nothing.expand(len(piece_K), 0), depth)
        for piece_K in tokens_K.split(256)
    ]
    return torch.cat(pieces)


def _shifts(head: Head, start: int, length: int) -> Tensor:
    """What position adds to a vector, [L, D]; zeros where the model rotates instead."""
    token_1 = torch.zeros(1, dtype=torch.int64)
    first_1D = _states(head, token_1, 0)
    states = [_states(head, token_1, depth) for depth in range(start, start + length)]
    return torch.cat(states) - first_1D
