"""Which tokens a single vector may stand for, before any prefix is known: a Gaussian per token.

Every token has a prototype, its vector in one public context; what other contexts change is one
covariance, measured on public rows. It does not search or know a language.

Shapes: V = vocabulary, X = values compared, D = hidden size, L = vectors of one row.
"""

from collections.abc import Callable, Sequence
from copy import deepcopy

import torch
from torch import Tensor

from cutlayer.audit.calibration import Calibration
from cutlayer.audit.known_noise import Space, mean_square_norms
from cutlayer.audit.token_tree import TokenTree
from cutlayer.model.partition import Head

__all__ = ["Shortlist", "TokenStates"]

_CHUNK = 256
_ROUGHNESS = 0.01
"""Share of a value by which states in bfloat16 are off, after some blocks."""
_USUAL_LENGTH = 48
"""Tokens of a row for whose clip prototypes are made."""
_SHRINKAGE = 0.01
"""Share of the mean variance that is added to all directions."""


class TokenStates:
    """States of all tokens of the vocabulary behind one prefix."""

    def __init__(self, head: Head, seconds_left: Callable[[], float]) -> None:
        """
        Args:
            head: the attacker's.
            seconds_left: until the attack has to stop.
        """
        self._head, self._seconds_left = head, seconds_left
        self.embedding_VD: Tensor = head.base.get_input_embeddings().weight.detach()
        self.num_tokens = len(self.embedding_VD)

    def rough(self, head: Head, prefix: Sequence[int]) -> Tensor | None:
        """States [V, D] of every token behind a prefix; None where time would not suffice.

        Args:
            head: this head, perhaps in a faster dtype (`faster`).
            prefix: token ids.
        """
        tree = TokenTree(head)
        for depth, token in enumerate(prefix):
            tree.run(torch.tensor([token]), torch.ones(1, depth, dtype=torch.bool), depth)
            tree.keep(torch.tensor([0]))
        return self.under(tree, torch.ones(len(prefix), dtype=torch.bool), len(prefix))

    def under(self, tree: TokenTree, seen_M: Tensor, depth: int) -> Tensor | None:
        """The same in a tree that exists; nothing is kept in it."""
        states, num_done = [], 0
        begin_s = self._seconds_left()
        for tokens_K in torch.arange(self.num_tokens).split(_CHUNK):
            h_KD = tree.run(tokens_K, seen_M.expand(len(tokens_K), -1), depth)
            states.append(h_KD.float())
            num_done += len(tokens_K)
            left_s = self._seconds_left()
            needed_s = (begin_s - left_s) / num_done * (self.num_tokens - num_done)
            if left_s <= 0 or (num_done >= 4 * _CHUNK and needed_s > 0.25 * left_s):
                return None
        return torch.cat(states)

    def faster(self) -> Head:
        """A copy of the head in bfloat16 where this machine multiplies that faster, or itself."""
        copy = deepcopy(self._head).to(torch.bfloat16)
        times_s = [self._seconds_of_a_chunk(head) for head in (copy, copy, self._head)]
        return copy if times_s[1] < times_s[2] else self._head

    def _seconds_of_a_chunk(self, head: Head) -> float:
        tokens_K = torch.arange(min(_CHUNK, self.num_tokens))
        begin_s = self._seconds_left()
        TokenTree(head).run(tokens_K, torch.zeros(len(tokens_K), 0, dtype=torch.bool), 0)
        return begin_s - self._seconds_left()


class Shortlist:
    """Prototypes of one head, seen through one space."""

    def __init__(self, space: Space, known: Calibration, states: TokenStates) -> None:
        """Measure.

        Args:
            space: where vectors are compared.
            known: public rows and their states.
            states: of all tokens.
        """
        self._known = known
        self.space = space
        pairs = [(row[1:], states_LD[1:]) for row, states_LD in _rows(known)]
        tokens_N = torch.tensor([token for tokens, _ in pairs for token in tokens])
        x_NX = space.expected(
            torch.cat([states_LD for _, states_LD in pairs]), self.factor(_USUAL_LENGTH)
        )
        head = states.faster()
        prototypes_VX = self._prototypes(states, head, tokens_N, x_NX)
        off_NX = x_NX - prototypes_VX[tokens_N]
        prototypes_VX = prototypes_VX + off_NX.mean(0)
        spread_XX = _covariance(off_NX)
        spread_X, self._basis_XX = torch.linalg.eigh(spread_XX)
        self._spread_X = spread_X.clamp(min=0) + _SHRINKAGE * spread_X.mean() + 1e-12
        self._centre_X = prototypes_VX.mean(0)
        self._prototypes_VX = (prototypes_VX - self._centre_X) @ self._basis_XX
        self.token_variance = float(self._prototypes_VX.var(0).median())
        """Median over values of the variance between tokens."""
        self.mean_token_variance = float(self._prototypes_VX.var(0).mean())
        """Mean over values; a few large values may dominate it."""
        first_VD = states.rough(head, ())
        self._first_VX = (
            None if first_VD is None else space.expected(first_VD, self.factor(_USUAL_LENGTH))
        )

    def factor(self, length: int) -> float:
        """What a clip of whole rows would leave of a row of that length."""
        norms_L = mean_square_norms(self._known.states_LD, length)
        return self.space.noise.row_factor(norms_L)

    def stretch(self, length: int) -> float:
        """What a vector of a row of that length is to be multiplied by before it is compared with
        prototypes: a clip of whole rows shrinks long rows more."""
        return self.factor(_USUAL_LENGTH) / self.factor(length)

    def scores(self, x_LX: Tensor, variance_L: Tensor) -> Tensor:
        """Log-likelihood [L, V] of every token for each vector, up to a constant per vector.

        Args:
            x_LX: observed vectors; none is the first of its row.
            variance_L: of the noise on each value, for each vector.
        """
        centred_LX = (x_LX - self._centre_X) @ self._basis_XX
        weights_LX = 1 / (self._spread_X + variance_L[:, None].float())
        linear_LV = (centred_LX * weights_LX) @ self._prototypes_VX.T
        scores_LV: Tensor = linear_LV - 0.5 * weights_LX @ self._prototypes_VX.square().T
        return scores_LV

    def first_scores(self, x_X: Tensor, variance: float) -> Tensor:
        """The same [V] for the first vector of a row, which no context moves."""
        if self._first_VX is None:
            return self.scores(x_X[None], torch.tensor([variance]))[0]
        square_V = (self._first_VX - x_X).square().sum(1)
        rough = _ROUGHNESS**2 * float(x_X.square().mean())
        return -0.5 * square_V / max(variance + rough, 1e-12)

    def near(self, x_X: Tensor, shift_X: Tensor, number: int) -> Tensor:
        """The tokens whose prototypes, shifted by what this context does, are nearest to a vector.

        Args:
            x_X: the vector.
            shift_X: mean of (state - prototype) over tokens that were tried in this context.
            number: of tokens.
        """
        centred_X = (x_X - shift_X - self._centre_X) @ self._basis_XX
        square_V = self._prototypes_VX.square().sum(1) - 2 * self._prototypes_VX @ centred_X
        nearest_K: Tensor = square_V.topk(min(number, len(square_V)), largest=False).indices
        return nearest_K

    def prototypes(self, tokens_K: Tensor) -> Tensor:
        """Prototypes [K, X] of some tokens."""
        usual_KX: Tensor = self._prototypes_VX[tokens_K] @ self._basis_XX.T + self._centre_X
        return usual_KX

    def _prototypes(
        self, states: TokenStates, head: Head, tokens_N: Tensor, x_NX: Tensor
    ) -> Tensor:
        prefix = next(iter(self._known.rows))[:12]
        all_VD = states.rough(head, prefix)
        if all_VD is not None:
            return self.space.expected(all_VD, self.factor(_USUAL_LENGTH))
        return _regression(states.embedding_VD[tokens_N], x_NX, states.embedding_VD)


def _rows(known: Calibration) -> Sequence[tuple[tuple[int, ...], Tensor]]:
    return list(zip(known.rows, known.states_LD, strict=True))


def _covariance(off_NX: Tensor) -> Tensor:
    centred_NX = off_NX - off_NX.mean(0)
    covariance_XX: Tensor = centred_NX.T @ centred_NX / max(1, len(off_NX) - 1)
    return covariance_XX


def _regression(from_ND: Tensor, to_NX: Tensor, all_VD: Tensor) -> Tensor:
    """Ridge regression with an offset, applied to all rows."""
    mean_D, mean_X = from_ND.mean(0), to_NX.mean(0)
    centred_ND = from_ND - mean_D
    gram_DD = centred_ND.T @ centred_ND
    ridge = 0.01 * float(gram_DD.diagonal().mean())
    gram_DD.diagonal().add_(ridge)
    weight_DX = torch.linalg.solve(gram_DD, centred_ND.T @ (to_NX - mean_X))
    fitted_VX: Tensor = (all_VD - mean_D) @ weight_DX + mean_X
    return fitted_VX
