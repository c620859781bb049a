"""Vocabulary matching over whole evidence: calibration, prior and search put together.

The attacks that match vocabularies differ in what they compare and how often it was seen; they
call this. It decides nothing about noise or links.

Shapes: L = vectors of one row, D = hidden size.
"""

import hashlib
from copy import copy

from torch import Tensor

from cutlayer.audit.attack import LATE, Effort, Guess
from cutlayer.audit.calibration import Calibration, calibrate
from cutlayer.audit.chains import Chain, guesses_of, known_places, nothing_of
from cutlayer.audit.head_search import Found, HeadSearch, Sought, Widths
from cutlayer.audit.knowledge import Knowledge
from cutlayer.audit.known_noise import ReleasedSpace, Space, are_withheld
from cutlayer.audit.search_prior import CountPrior, LanguagePrior, Prior, count_log_probs
from cutlayer.audit.shortlist import Shortlist, TokenStates

__all__ = ["Deadline", "Matching"]


class Deadline:
    """How many seconds an attack that began when this was made has left."""

    def __init__(self, effort: Effort) -> None:
        """
        Args:
            effort: its clock and its seconds.
        """
        self._clock_s = effort.clock_s
        self._end_s = effort.clock_s() + effort.seconds
        self._late_s = (1 - LATE) * effort.seconds

    def __call__(self) -> float:
        """Seconds; negative behind the end."""
        return self._end_s - self._clock_s()

    def is_late(self) -> bool:
        """Whether even each vector's own best takes more time than there was."""
        return self() < self._late_s


class Matching:
    """One attack's search, measured once and used for all rows."""

    def __init__(
        self,
        knowledge: Knowledge,
        space: Space,
        seconds_left: Deadline,
        known: Calibration | None = None,
        widths: Widths | None = None,
    ) -> None:
        """
        Args:
            knowledge: what the attacker has.
            space: where vectors are compared.
            seconds_left: until it has to stop.
            known: public rows through the head; None makes them.
            widths: how wide to look.
        """
        self._knowledge, self._space = knowledge, space
        head = knowledge.parts[0]
        known = known or calibrate(knowledge, 0, lambda: seconds_left() <= 0)
        self.shortlist = Shortlist(space, known, TokenStates(head, seconds_left))
        self._counts_V = count_log_probs(knowledge.public_rows, len(knowledge.embedding_VD))
        self._seconds_left, self._widths = seconds_left, widths
        self._search = HeadSearch(head, space, self.shortlist, seconds_left, widths)
        self._by_content: dict[str, Found] = {}

    def averaged(self, number: int) -> "Matching":
        """The same for means over `number` independent releases."""
        other = copy(self)
        other._space = ReleasedSpace(self._space.noise.averaged(number))
        other._search = HeadSearch(
            self._knowledge.parts[0], other._space, self.shortlist, self._seconds_left, self._widths
        )
        other._by_content = {}
        return other

    def find(self, chain: Chain, h_LD: Tensor) -> list[Guess]:
        """Guesses for the pieces of a row; nothing is said of one that comes far too late.

        Args:
            chain: the row.
            h_LD: its vectors, as they were released or averaged.
        """
        content = hashlib.sha256(h_LD.contiguous().numpy().tobytes()).hexdigest()
        found = self._by_content.get(content)
        if found is not None:
            # A replay: found already, at no cost.
            return guesses_of(chain, found.tokens, found.confidences)
        if self._seconds_left.is_late():
            return nothing_of(chain)
        found = self._by_content[content] = self._found(chain, h_LD)
        return guesses_of(
            chain, found.tokens, found.confidences, found.num_fallbacks, found.num_unfinished
        )

    def each_alone(self, chain: Chain) -> tuple[int, ...]:
        """Each vector's own best token, without a search."""
        sought = self._sought(chain, chain.h_LD)
        return self._search.find_each_alone(sought, CountPrior(self._counts_V)).tokens

    def _found(self, chain: Chain, h_LD: Tensor) -> Found:
        sought = self._sought(chain, h_LD)
        if not chain.has_beginning:
            return self._search.find_each_alone(sought, CountPrior(self._counts_V))
        return self._search.find(sought, self._prior(sought))

    def _sought(self, chain: Chain, h_LD: Tensor) -> Sought:
        return Sought(
            x_LX=self._space.observed(h_LD),
            withheld_L=are_withheld(h_LD),
            known=known_places(chain, self._knowledge.template),
        )

    def _prior(self, sought: Sought) -> Prior:
        beyond = self._search.excess.share(self.shortlist.token_variance)
        is_clear = self._space.noise.variance == 0 and beyond < _CLEAR
        if is_clear and not bool(sought.withheld_L.any()):
            return CountPrior(self._counts_V)
        return LanguagePrior(self._knowledge, self._counts_V)


_CLEAR = 0.02
"""Variance of unexplained residuals, as a share of that between tokens, below which vectors decide
alone where no noise was added."""
