"""How many tokens to guess for one stream: what is likely to be right against what it costs.

It measures nothing itself and has no clock: rounds are told to it. It does not draft (`drafting`).

The expected tokens of a round with k guesses, each right with probability a after those before
it, are (1 - a^(k+1)) / (1 - a) (Leviathan et al., arXiv 2211.17192, equation 1).
"""

__all__ = ["DraftLength", "RoundCost"]

_KEEP_TRIALS = 0.85
"""Weight of what is known of acceptance after one more guess: about seven count."""
_FIRST_ACCEPTANCE = 0.6
_FIRST_TRIALS = 1.5
_KEEP_ROUNDS = 0.8
_FIRST_SLOPE = 0.1
"""Share of a plain round that one guess is taken to cost before any was measured."""
_OUTLIER = 3.0
"""A round counts as at most so many usual ones: it may have carried another stream's prompt."""
_SURPRISE = 1.5
"""A round so many times faster than a plain one shows that plain rounds were mistaken."""
_LEAST_GAIN = 1.02
"""Expected speed against plain decoding that makes guesses worth their while."""
_PROBE_TOKENS = 2
_MOST_WAIT = 64
_PROBE_LOSS = 0.02
"""Share of the time that probes may cost in the long run: where they are cheap, they come often."""
_MOST_LOSS = 0.03
"""Share of the time of plain decoding that wrong guesses may cost."""
_ALLOWANCE_ROUNDS = 1.0
"""Plain rounds that may be lost before anything was won."""
_MOST_CREDIT_ROUNDS = 3.0
_BASE_EVERY = 64
"""Rounds with guesses after which one without them is timed again."""


class RoundCost:
    """Seconds of a round by its guesses: base + slope * k. Streams of one client share one."""

    def __init__(self) -> None:
        self._base_s: float | None = None
        self._drafted_s: float | None = None
        self._mean_drafted = 0.0
        self._rounds_without_base = 0

    @property
    def wants_base(self) -> bool:
        """Whether rounds with guesses alone have been seen for long."""
        limit = 1 if self._base_s is None else _BASE_EVERY
        return self._rounds_without_base >= limit

    @property
    def base_s(self) -> float:
        """Seconds of a round without guesses; 0 before the first round."""
        if self._base_s is not None:
            return self._base_s
        if self._drafted_s is None:
            return 0.0
        return self._drafted_s / (1 + _FIRST_SLOPE * self._mean_drafted)

    def seconds(self, num_drafted: float) -> float:
        """Expected seconds of a round."""
        return self.base_s + self._slope_s * num_drafted

    def observe(self, num_drafted: int, seconds: float) -> None:
        """A round that took this long."""
        if self._base_s is not None and seconds < self._base_s / _SURPRISE:
            # Guesses do not save time: what was taken for a plain round had carried something else.
            self._base_s = seconds / (1 + _FIRST_SLOPE * num_drafted)
        expected_s = self.seconds(num_drafted)
        if expected_s > 0:
            seconds = min(seconds, _OUTLIER * expected_s)
        if num_drafted == 0:
            self._rounds_without_base = 0
            self._base_s = _mixed(self._base_s, seconds)
        else:
            self._rounds_without_base += 1
            self._mean_drafted = _mixed(self._mean_drafted or None, num_drafted)
            self._drafted_s = _mixed(self._drafted_s, seconds)

    @property
    def _slope_s(self) -> float:
        if self._base_s is None or self._drafted_s is None:
            return _FIRST_SLOPE * self.base_s
        return max(0.0, self._drafted_s - self._base_s) / self._mean_drafted


class DraftLength:
    """Chooses for one stream before each round; is told how the round went."""

    def __init__(self, max_tokens: int, cost: RoundCost | None = None) -> None:
        """Start optimistic and cheap.

        Args:
            max_tokens: guesses of one round at most.
            cost: what rounds cost, where other streams have measured it already.
        """
        self._max_tokens = max_tokens
        self._cost = RoundCost() if cost is None else cost
        self._right = _FIRST_ACCEPTANCE * _FIRST_TRIALS
        self._trials = _FIRST_TRIALS
        self._wait = 0
        self._next_wait = 1
        self._credit_s = 0.0

    @property
    def acceptance(self) -> float:
        """Estimated share of guesses that are right, those after a wrong one left out."""
        return self._right / self._trials

    def next(self, num_streams: int = 1) -> int:
        """Guesses that the next round should have; 0 for plain decoding.

        Args:
            num_streams: of the round, this one included; all wait for the guesses of each.
        """
        if self._cost.wants_base:
            return 0
        if self._credit_s < -_ALLOWANCE_ROUNDS * self._cost.base_s:
            return 0
        speeds = [self._speed(k, num_streams) for k in range(self._max_tokens + 1)]
        best = max(range(len(speeds)), key=speeds.__getitem__)
        if best and speeds[best] >= _LEAST_GAIN * speeds[0]:
            return best
        return 0 if self._wait else min(_PROBE_TOKENS, self._max_tokens)

    def observe(self, num_drafted: int, num_accepted: int, seconds: float) -> None:
        """How a round went.

        Args:
            num_drafted: guesses that were verified; 0 also where the drafter had none.
            num_accepted: how many of them stood.
            seconds: of the whole round, with the making of the guesses.
        """
        self._cost.observe(num_drafted, seconds)
        if num_drafted == 0:
            self._wait = max(0, self._wait - 1)
        else:
            self._learn(num_drafted, num_accepted)
        self._account(num_accepted, seconds)

    def _learn(self, num_drafted: int, num_accepted: int) -> None:
        for is_right in [1.0] * num_accepted + [0.0] * (num_accepted < num_drafted):
            self._right = _KEEP_TRIALS * self._right + is_right
            self._trials = _KEEP_TRIALS * self._trials + 1
        self._next_wait = 1 if num_accepted else min(2 * self._next_wait, self._most_wait())
        self._wait = self._next_wait

    def _most_wait(self) -> int:
        base_s = max(self._cost.base_s, 1e-9)
        lost = (self._cost.seconds(_PROBE_TOKENS) - base_s) / base_s
        return min(_MOST_WAIT, 1 + int(lost / _PROBE_LOSS))

    def _account(self, num_accepted: int, seconds: float) -> None:
        """Keep count of the time won or lost: no estimate can then lose more than is allowed."""
        base_s = self._cost.base_s
        plain_s = (num_accepted + 1) * base_s
        won_s = plain_s - min(seconds, _OUTLIER * self._cost.seconds(self._max_tokens))
        self._credit_s += won_s * (num_accepted > 0 or won_s < 0) + _MOST_LOSS * plain_s
        self._credit_s = min(self._credit_s, _MOST_CREDIT_ROUNDS * base_s)

    def _speed(self, num_drafted: int, num_streams: int) -> float:
        """Expected tokens per second of all streams, where the others have one in each round."""
        a = min(self.acceptance, 0.999)
        seconds = self._cost.seconds(num_drafted)
        own = (1 - a ** (num_drafted + 1)) / (1 - a)
        return (num_streams - 1 + own) / seconds if seconds > 0 else 1.0


def _mixed(old: float | None, new: float) -> float:
    return new if old is None else _KEEP_ROUNDS * old + (1 - _KEEP_ROUNDS) * new
