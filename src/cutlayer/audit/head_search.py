"""Vocabulary matching: a beam search for the tokens whose states are the observed ones.

A hypothesis is scored by log p(tokens) under the prior plus the log-likelihood of all vectors so
far, so later vectors rank what earlier ones left open. Prior, space and shortlist are given; it
knows no evidence format.

Shapes: L = vectors of one row, X = values compared, K = candidates of a step, W = hypotheses kept,
M = nodes of the tree, V = vocabulary.

Source: arXiv 2505.18332 (vocabulary matching), arXiv 2510.15511 (SipIt); the beam, the language
    prior and the noise model are additions.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from cutlayer.audit.excess import Excess
from cutlayer.audit.known_noise import Space
from cutlayer.audit.search_prior import Prior
from cutlayer.audit.shortlist import Shortlist, TokenStates
from cutlayer.audit.token_tree import TokenTree
from cutlayer.model.partition import Head

__all__ = ["Found", "HeadSearch", "Sought", "Widths"]


_BLOCK = 32
"""Vectors whose scores for the whole vocabulary are held at a time."""
_ALONE = 4
"""Candidates that are the vector's own best, whatever the prior says."""


@dataclass(frozen=True, kw_only=True)
class Widths:
    """How wide a search looks."""

    hypotheses: int = 8
    """Prefixes kept after each token."""
    blind: int = 32
    """The same after a vector that was withheld: later ones have to decide."""
    candidates: int = 96
    """Tokens tried at each place, of all prefixes together."""
    wider: int = 768
    """Tokens tried where the residual is larger than the noise explains."""
    margin: float = 16.0
    """Prefixes this much worse than the best are dropped, in nats."""
    cutoff: float = 60.0
    """Candidates that the shortlist finds this much worse than its best are not tried."""


@dataclass(frozen=True, kw_only=True)
class Sought:
    """One row to reconstruct, from its first token."""

    x_LX: Tensor = field(repr=False)
    """Observed vectors, in the search's space."""
    withheld_L: Tensor = field(repr=False)
    """Which of them say nothing, boolean."""
    known: Mapping[int, int] = field(default_factory=dict, repr=False)
    """Token that is known to stand at a place; where its vector says otherwise, that counts."""


@dataclass(kw_only=True)
class Found:
    """What a search found for one row."""

    tokens: tuple[int, ...] = field(default=(), repr=False)
    """Of the best hypothesis."""
    confidences: tuple[float, ...] = field(default=(), repr=False)
    """Posterior of each token among those tried, when it was chosen."""
    num_fallbacks: int = 0
    """Places where the whole vocabulary was tried."""
    num_unfinished: int = 0
    """Places that took the shortlist's best, for want of time."""


@dataclass
class _Beam:
    """Hypotheses of equal length, best first."""

    tokens_WL: Tensor
    confidences_WL: Tensor
    scores_W: Tensor
    seen_WM: Tensor
    prior_WV: Tensor


@dataclass
class _Tried:
    """Candidates of one step with their scores."""

    beams_K: Tensor
    tokens_K: Tensor
    h_KD: Tensor
    square_K: Tensor
    scores_K: Tensor


class HeadSearch:
    """Searches rows one by one; what it learns of the size of residuals it keeps."""

    def __init__(
        self,
        head: Head,
        space: Space,
        shortlist: Shortlist,
        seconds_left: Callable[[], float],
        widths: Widths | None = None,
    ) -> None:
        """
        Args:
            head: the attacker's.
            space: where states and observations are compared.
            shortlist: of the same space.
            seconds_left: until the attack has to stop.
            widths: how wide to look.
        """
        self._head, self._space, self._shortlist = head, space, shortlist
        self._states = TokenStates(head, seconds_left)
        self._seconds_left = seconds_left
        self._widths = widths or Widths()
        self.excess = Excess(space.variance)

    @torch.no_grad()
    def find(self, sought: Sought, prior: Prior) -> Found:
        """The most likely tokens of one row; after the deadline, each vector's own best.

        Args:
            sought: the row.
            prior: made for this row.
        """
        row = _Row(self, sought, prior)
        found = Found()
        length = len(sought.x_LX)
        while row.depth < length and self._seconds_left() > 0:
            row.step(found)
        tokens, confidences = row.best()
        found.num_unfinished = length - row.depth
        late = self._guesses(sought, row.depth, prior)
        found.tokens = tuple(tokens + late)
        found.confidences = tuple(confidences + [0.0] * len(late))
        return found

    @torch.no_grad()
    def find_each_alone(self, sought: Sought, prior: Prior) -> Found:
        """Each vector's own best: for rows whose beginning nobody has."""
        length = len(sought.x_LX)
        tokens = tuple(self._guesses(sought, 0, prior))
        return Found(tokens=tokens, confidences=(0.0,) * length, num_unfinished=length)

    def vector_scores(self, sought: Sought, places: range) -> Tensor:
        """Log-likelihoods [places, V] of every token for single vectors; zeros where withheld."""
        x_LX = sought.x_LX[places.start : places.stop]
        variances_L = torch.tensor([self.excess.variance(x_X) for x_X in x_LX])
        stretch = self._shortlist.stretch(len(sought.x_LX))
        x_LX, variances_L = x_LX * stretch, variances_L * stretch**2
        scores_LV = self._shortlist.scores(x_LX, variances_L)
        if places.start == 0:
            scores_LV[0] = self._shortlist.first_scores(x_LX[0], float(variances_L[0]))
        scores_LV[sought.withheld_L[places.start : places.stop]] = 0
        return scores_LV

    def _guesses(self, sought: Sought, begin: int, prior: Prior) -> list[int]:
        """The known token or each vector's own best, from a place on."""
        tokens: list[int] = []
        for places in _blocks(begin, len(sought.x_LX)):
            tokens += (self.vector_scores(sought, places) + prior.first()).argmax(1).tolist()
        return [sought.known.get(begin + index, token) for index, token in enumerate(tokens)]


def _blocks(begin: int, end: int) -> list[range]:
    return [range(first, min(first + _BLOCK, end)) for first in range(begin, end, _BLOCK)]


class _Row:
    """The search of one row."""

    def __init__(self, search: HeadSearch, sought: Sought, prior: Prior) -> None:
        self.depth = 0
        self._search, self._sought, self._prior = search, sought, prior
        self._tree = TokenTree(search._head)
        self._factor = search._shortlist.factor(len(sought.x_LX))
        self._block_LV = torch.zeros(0)
        self._beam = _Beam(
            tokens_WL=torch.zeros(1, 0, dtype=torch.int64),
            confidences_WL=torch.zeros(1, 0),
            scores_W=torch.zeros(1, dtype=torch.float64),
            seen_WM=torch.zeros(1, 0, dtype=torch.bool),
            prior_WV=prior.first()[None],
        )

    def step(self, found: Found) -> None:
        """Find the next token of all hypotheses."""
        tried = self._try(*self._candidates())
        if not self._fits(tried):
            tried = self._try_more(tried, found)
        self._advance(tried)
        self.depth += 1

    def best(self) -> tuple[list[int], list[float]]:
        """Tokens and confidences of the best hypothesis so far."""
        return self._beam.tokens_WL[0].tolist(), self._beam.confidences_WL[0].tolist()

    @property
    def _is_withheld(self) -> bool:
        return bool(self._sought.withheld_L[self.depth])

    def _candidates(self) -> tuple[Tensor, Tensor]:
        """Pairs (hypothesis, token) that the shortlist and the prior find best together."""
        beam, widths = self._beam, self._search._widths
        vector_V = self._vector_scores()
        if self.depth in self._sought.known:
            everyone = torch.arange(len(beam.scores_W))
            return everyone, torch.full_like(everyone, self._sought.known[self.depth])
        # Shares of the hypotheses in float32: their differences are what counts.
        ahead_W1 = (beam.scores_W - beam.scores_W[0]).float()[:, None]
        total_WV = beam.prior_WV + vector_V + ahead_W1
        best = total_WV.flatten().topk(min(widths.candidates, total_WV.numel()))
        pairs = best.indices[best.values > best.values[0] - widths.cutoff]
        alone = vector_V.topk(min(_ALONE, len(vector_V))).indices
        pairs = torch.cat([pairs, alone]).unique()
        return pairs // len(vector_V), pairs % len(vector_V)

    def _vector_scores(self) -> Tensor:
        """Of the next vector; made for some of them together."""
        if self.depth % _BLOCK == 0:
            end = min(self.depth + _BLOCK, len(self._sought.x_LX))
            self._block_LV = self._search.vector_scores(self._sought, range(self.depth, end))
        scores_V: Tensor = self._block_LV[self.depth % _BLOCK]
        return scores_V

    def _try(self, beams_K: Tensor, tokens_K: Tensor) -> _Tried:
        h_KD = self._tree.run(tokens_K, self._beam.seen_WM[beams_K], self.depth)
        return self._scored(beams_K, tokens_K, h_KD)

    def _scored(self, beams_K: Tensor, tokens_K: Tensor, h_KD: Tensor) -> _Tried:
        search, beam = self._search, self._beam
        x_X = self._sought.x_LX[self.depth]
        scores_K = beam.scores_W[beams_K] + beam.prior_WV[beams_K, tokens_K]
        square_K = torch.zeros(len(tokens_K))
        if not self._is_withheld:
            expected_KX = search._space.expected(h_KD, self._factor)
            square_K = (expected_KX - x_X).square().sum(1)
            scores_K = scores_K - square_K.double() / (2 * search.excess.variance(x_X))
        return _Tried(beams_K, tokens_K, h_KD, square_K, scores_K)

    def _fits(self, tried: _Tried) -> bool:
        """Whether noise explains the residual of the best candidate."""
        if self._is_withheld:
            return True
        x_X = self._sought.x_LX[self.depth]
        return self._search.excess.explains(x_X, float(tried.square_K[tried.scores_K.argmax()]))

    def _try_more(self, tried: _Tried, found: Found) -> _Tried:
        """More candidates behind the best hypothesis, and at last the whole vocabulary."""
        beam = int(tried.beams_K[tried.scores_K.argmax()])
        mine_K = tried.beams_K == beam
        expected_KX = self._search._space.expected(tried.h_KD[mine_K], self._factor)
        usual_KX = self._search._shortlist.prototypes(tried.tokens_K[mine_K])
        stretch = self._search._shortlist.stretch(len(self._sought.x_LX))
        x_X = self._sought.x_LX[self.depth] * stretch
        shift_X = (expected_KX * stretch - usual_KX).mean(0)
        tokens_K = self._search._shortlist.near(x_X, shift_X, self._search._widths.wider)
        wider = self._try(torch.full_like(tokens_K, beam), tokens_K)
        if not self._fits(wider):
            wider = self._try_all(beam, found) or wider
        return self._together(tried, wider)

    def _try_all(self, beam: int, found: Found) -> _Tried | None:
        """The whole vocabulary behind one hypothesis; None where time does not suffice."""
        h_VD = self._search._states.under(self._tree, self._beam.seen_WM[beam], self.depth)
        if h_VD is None:
            return None
        found.num_fallbacks += 1
        tokens_V = torch.arange(len(h_VD))
        return self._scored(torch.full_like(tokens_V, beam), tokens_V, h_VD)

    def _together(self, tried: _Tried, wider: _Tried) -> _Tried:
        """What was tried first and the best of the rest, run once more: of a tree's calls only the
        last one's tokens can be kept."""
        number = min(self._search._widths.candidates, len(wider.tokens_K))
        best_K = wider.scores_K.topk(number).indices
        pairs_2K = torch.stack(
            [
                torch.cat([tried.beams_K, wider.beams_K[best_K]]),
                torch.cat([tried.tokens_K, wider.tokens_K[best_K]]),
            ]
        )
        beams_K, tokens_K = pairs_2K.unique(dim=1)
        return self._try(beams_K, tokens_K)

    def _advance(self, tried: _Tried) -> None:
        """Keep the best candidates as hypotheses."""
        search = self._search
        best = tried.scores_K.max()
        widths = search._widths
        number = widths.blind if self._is_withheld else widths.hypotheses
        order_K = tried.scores_K.argsort(descending=True)[:number]
        chosen_W = order_K[tried.scores_K[order_K] > best - widths.margin]
        if not self._is_withheld:
            x_X = self._sought.x_LX[self.depth]
            search.excess.learn(x_X, float(tried.square_K[chosen_W[0]]))
        self._tree.keep(chosen_W)
        self._beam = self._grown(tried, chosen_W)
        if self.depth + 1 < len(self._sought.x_LX):
            before_WM = self._beam.seen_WM[:, : -len(chosen_W)]
            self._beam.prior_WV = self._prior.follow(tried.h_KD[chosen_W], before_WM, self.depth)
            self._forget()

    def _grown(self, tried: _Tried, chosen_W: Tensor) -> _Beam:
        """The hypotheses with their new tokens; their prior is still that of these tokens."""
        beam = self._beam
        parents_W, tokens_W = tried.beams_K[chosen_W], tried.tokens_K[chosen_W]
        shares_K = (tried.scores_K - tried.scores_K.max()).softmax(0).float()
        shares_W = torch.stack([shares_K[tried.tokens_K == token].sum() for token in tokens_W])
        new_WW = torch.eye(len(chosen_W), dtype=torch.bool)
        return _Beam(
            tokens_WL=torch.cat([beam.tokens_WL[parents_W], tokens_W[:, None]], dim=1),
            confidences_WL=torch.cat([beam.confidences_WL[parents_W], shares_W[:, None]], dim=1),
            scores_W=tried.scores_K[chosen_W],
            seen_WM=torch.cat([beam.seen_WM[parents_W], new_WW], dim=1),
            prior_WV=beam.prior_WV[parents_W],
        )

    def _forget(self) -> None:
        """Drop the nodes that no hypothesis has in its past."""
        nodes_M = self._beam.seen_WM.any(dim=0).nonzero().flatten()
        if len(nodes_M) == self._beam.seen_WM.shape[1]:
            return
        self._tree.select(nodes_M)
        self._prior.select(nodes_M)
        self._beam.seen_WM = self._beam.seen_WM[:, nodes_M]
