"""How much of what was hidden an attack has found, and what the same guesses are worth by chance.

It runs no attack and prints nothing; the same guesses always give the same numbers. Only private
tokens are counted, each once: of several observations of one row the one counts in which the
attack trusts most.

Shapes: P = private places of all rows together.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from cutlayer.audit.attack import Aim, Guess
from cutlayer.audit.bag import bag_chance
from cutlayer.audit.shares import Share, share
from cutlayer.audit.truth import Hidden
from cutlayer.errors import ConfigError, DataError
from cutlayer.evaluation.text_metrics import METRICS

__all__ = ["Rouge", "Score", "Scorer"]

_NOTHING = -1
_SHUFFLES = 100


@dataclass(frozen=True, kw_only=True)
class Rouge:
    """F1 on the text of a row's private tokens, mean over the rows, 0 to 1."""

    rouge_1: float
    """Words."""
    rouge_2: float
    """Pairs of words."""
    rouge_l: float
    """Longest common subsequence of words."""


@dataclass(frozen=True, kw_only=True)
class Score:
    """One attack on one recording."""

    aim: Aim
    recovery: Share
    """Aim.TOKENS: private tokens right in their place. Aim.LABELS: private labels that are right.
    Aim.BAG: different private tokens of a round that were named. Aim.CANARIES: tokens of planted
    secrets that are right in their place, form aside."""
    chance: float
    """The same guesses against shuffled targets, mean over the shuffles. Under Aim.BAG against as
    many different tokens drawn from the public rows."""
    chance_error: float
    """How far a recovery lies from `chance` where nothing was found: standard deviation over the
    shuffles, at least the weight of one token."""
    precision: Share | None = None
    """Aim.BAG: named tokens that did occur."""
    majority: Share | None = None
    """Aim.LABELS: what always guessing the commonest label gets."""
    rouge: Rouge | None = None
    """Aim.TOKENS, where text can be made and rouge-score is installed."""
    rare: Share | None = None
    """Aim.TOKENS: recovery of the private tokens that are not among the common ones of the public
    rows; None without public rows, or where no private token is rare."""
    canaries: Share | None = None
    """Planted rows of tokens recovered whole, of those that stood in private text."""
    num_rows: int
    """Rows with something to recover."""
    num_said: int
    """Counted places at which the attack said something."""
    num_fallbacks: int
    """Positions with the slow exact search."""
    num_unfinished: int
    """Positions that had to take the fast search's best, for want of time."""
    num_positions: int
    """Of all guesses, counted or not."""

    @property
    def had_no_time(self) -> bool:
        """Whether it found nothing, with half of the work undone: that measures nothing."""
        is_cut_short = self.num_unfinished > 0 and 2 * self.num_unfinished >= self.num_positions
        return self.recovery.value == 0 and is_cut_short

    @property
    def is_chance(self) -> bool:
        """Whether the recovery is within 3 standard errors of chance."""
        return abs(self.recovery.value - self.chance) <= 3 * self.chance_error


@dataclass(frozen=True, kw_only=True)
class Scorer:
    """How to score."""

    text_of: Callable[[Sequence[int]], str] | None = None
    """Token ids to text, for ROUGE; None leaves it out."""
    public_rows: Sequence[Sequence[int]] = field(default=(), repr=False)
    """Public text, which says what tokens are common."""
    num_common: int = 1000
    """Tokens that count as common: the most frequent of the public rows."""
    canaries: Sequence[Sequence[int]] = field(default=(), repr=False)
    """Rows of tokens that were planted in private text."""
    vocab_size: int | None = None
    """Where a bag's chance draws from without public rows."""
    seed: int = 0
    """Of the shuffles."""

    def score(self, aim: Aim, guesses: Iterable[Guess], hidden: Mapping[int, Hidden]) -> Score:
        """Score one attack.

        Args:
            aim: the attack's.
            guesses: what it said.
            hidden: by number of the observation; by round under Aim.BAG.

        Raises:
            DataError: nothing is hidden that this aim could find.
        """
        said = {guess.number: guess for guess in guesses}
        unknown = set(said) - set(hidden)
        assert not unknown, f"guesses about {sorted(unknown)}, which are no observations"
        return self._bags(said, hidden) if aim is Aim.BAG else self._rows(aim, said, hidden)

    def _rows(self, aim: Aim, said: Mapping[int, Guess], hidden: Mapping[int, Hidden]) -> Score:
        rows = [_Row.of(aim, *pair) for pair in _one_a_row(said, hidden)]
        rows = [row for row in rows if row.places]
        if not rows:
            what = "private scored token" if aim is Aim.LABELS else "private token"
            raise DataError(f"nothing to score: no observation has a {what}")
        guesses_P = np.array([token for row in rows for token in row.guessed()])
        targets_P = np.array([token for row in rows for token in row.wanted()])
        chance, chance_error = _shuffled(guesses_P, targets_P, self.seed)
        is_tokens = aim is Aim.TOKENS
        return Score(
            aim=aim,
            recovery=share(int((guesses_P == targets_P).sum()), len(targets_P)),
            chance=chance,
            chance_error=chance_error,
            majority=_majority(targets_P) if aim is Aim.LABELS else None,
            rouge=self._rouge(rows) if is_tokens else None,
            rare=self._rare(guesses_P, targets_P) if is_tokens else None,
            canaries=None if aim is Aim.LABELS else self._canaries(rows),
            num_rows=len(rows),
            num_said=int((guesses_P != _NOTHING).sum()),
            num_fallbacks=sum(guess.num_fallbacks for guess in said.values()),
            num_unfinished=sum(guess.num_unfinished for guess in said.values()),
            num_positions=sum(len(guess.tokens) for guess in said.values()),
        )

    def _bags(self, said: Mapping[int, Guess], hidden: Mapping[int, Hidden]) -> Score:
        bags = {n: {h.tokens[place] for place in h.private_places()} for n, h in hidden.items()}
        bags = {number: bag for number, bag in bags.items() if bag}
        if not bags:
            raise DataError("nothing to score: no round has a private token")
        named = {n: set(said[n].tokens) - {_NOTHING} if n in said else set() for n in bags}
        templates = {n: set(hidden[n].tokens) - bags[n] for n in bags}
        num_found = sum(len(bags[n] & named[n]) for n in bags)
        num_wanted = sum(map(len, bags.values()))
        counted = sum(len(named[n] - templates[n]) for n in bags)
        pool = [token for row in self.public_rows for token in row] or range(self.vocab_size or 0)
        chance, chance_error = bag_chance(bags, named, pool, self.seed)
        return Score(
            aim=Aim.BAG,
            recovery=share(num_found, num_wanted),
            chance=chance,
            chance_error=chance_error,
            precision=share(num_found, counted) if counted else None,
            num_rows=len(bags),
            num_said=sum(map(len, named.values())),
            num_fallbacks=sum(guess.num_fallbacks for guess in said.values()),
            num_unfinished=sum(guess.num_unfinished for guess in said.values()),
            num_positions=sum(len(guess.tokens) for guess in said.values()),
        )

    def _rouge(self, rows: Sequence["_Row"]) -> Rouge | None:
        if self.text_of is None:
            return None
        try:
            metrics = [METRICS.make(name) for name in ("rouge_1", "rouge_2", "rouge_l")]
        except ConfigError:
            return None
        texts = [(self.text_of(row.said_tokens()), self.text_of(row.wanted())) for row in rows]
        means = [sum(m(said, [true]) for said, true in texts) / len(texts) for m in metrics]
        return Rouge(rouge_1=means[0], rouge_2=means[1], rouge_l=means[2])

    def _rare(self, guesses_P: np.ndarray, targets_P: np.ndarray) -> Share | None:
        counts = Counter(token for row in self.public_rows for token in row)
        common = [token for token, _ in counts.most_common(self.num_common)]
        is_rare_P = ~np.isin(targets_P, common)
        if not counts or not is_rare_P.any():
            return None
        num_right = int((guesses_P == targets_P)[is_rare_P].sum())
        return share(num_right, int(is_rare_P.sum()))

    def _canaries(self, rows: Sequence["_Row"]) -> Share | None:
        found = [
            row.guess_at(range(begin, begin + len(canary))) == list(canary)
            for row in rows
            for canary in self.canaries
            for begin in _occurrences(canary, row.hidden.tokens)
        ]
        return share(sum(found), len(found)) if found else None


@dataclass(frozen=True, kw_only=True)
class _Row:
    """One row with the guess that counts for it."""

    hidden: Hidden
    targets: tuple[int, ...]
    """Tokens, or labels."""
    guess: Guess | None
    places: list[int]
    """What counts."""

    @classmethod
    def of(cls, aim: Aim, hidden: Hidden, guess: Guess | None) -> "_Row":
        is_labels = aim is Aim.LABELS
        assert guess is None or len(guess.tokens) == len(hidden.tokens), (
            f"{len(hidden.tokens)} vectors, and as many tokens wanted in a guess"
        )
        return cls(
            hidden=hidden,
            targets=hidden.labels if is_labels else hidden.tokens,
            guess=guess,
            places=hidden.label_places() if is_labels else hidden.private_places(),
        )

    def guess_at(self, places: Iterable[int]) -> list[int]:
        return [_NOTHING if self.guess is None else self.guess.tokens[place] for place in places]

    def guessed(self) -> list[int]:
        return self.guess_at(self.places)

    def said_tokens(self) -> list[int]:
        return [token for token in self.guessed() if token != _NOTHING]

    def wanted(self) -> list[int]:
        return [self.targets[place] for place in self.places]


def _one_a_row(
    said: Mapping[int, Guess], hidden: Mapping[int, Hidden]
) -> list[tuple[Hidden, Guess | None]]:
    """Each row once, with the guess of the highest mean confidence; None where none was made."""
    numbers: dict[tuple[str, tuple[int, ...]], list[int]] = defaultdict(list)
    for number in sorted(hidden):
        name = hidden[number].row_id or f" {number}"
        numbers[name, hidden[number].tokens].append(number)
    chosen = []
    for same in numbers.values():
        guesses = [said[number] for number in same if number in said]
        chosen.append((hidden[same[0]], max(guesses, key=_trust, default=None)))
    return chosen


def _trust(guess: Guess) -> float:
    return sum(guess.confidences) / max(1, len(guess.confidences))


def _shuffled(guesses_P: np.ndarray, targets_P: np.ndarray, seed: int) -> tuple[float, float]:
    """Mean share of right guesses over shuffles of the targets, and its spread."""
    generator = np.random.default_rng(seed)
    shares = [
        float((guesses_P == generator.permutation(targets_P)).mean()) for _ in range(_SHUFFLES)
    ]
    return float(np.mean(shares)), max(float(np.std(shares)), 1 / len(targets_P))


def _majority(targets_P: np.ndarray) -> Share:
    return share(int(np.unique(targets_P, return_counts=True)[1].max()), len(targets_P))


def _occurrences(canary: Sequence[int], tokens: Sequence[int]) -> list[int]:
    wanted = tuple(canary)
    ends = len(tokens) - len(wanted) + 1
    return [at for at in range(ends) if wanted and tuple(tokens[at : at + len(wanted)]) == wanted]
