"""What the soak run's sessions do next, drawn from a seed; nothing is sent here.

A prompt has one right reply, which a solo run has given. A session goes along it, idles, goes on,
is cancelled or ends, and begins anew with another prompt.
"""

import random
from collections.abc import Sequence
from enum import StrEnum

import msgspec

__all__ = ["Act", "Script", "SoakPrompt", "make_prompts"]


class Act(StrEnum):
    """What a session does next."""

    GO_ON = "go on"
    IDLE = "idle"
    CANCEL = "cancel"


_WEIGHTS = {Act.GO_ON: 6, Act.IDLE: 3, Act.CANCEL: 1}
_MAX_TOKENS_AT_ONCE = 6
_MAX_IDLE_S = 8.0


class SoakPrompt(msgspec.Struct, frozen=True, kw_only=True):
    """A prompt and how it is continued."""

    tokens: list[int]
    new_tokens: int
    temperature: float
    seed: int


class Script:
    """Draws what sessions do; the same seed gives the same draws in the same order."""

    def __init__(self, seed: int, num_prompts: int) -> None:
        self._random = random.Random(seed)
        self._num_prompts = num_prompts

    def prompt(self) -> int:
        """Which prompt a session begins with."""
        return self._random.randrange(self._num_prompts)

    def act(self) -> Act:
        """What a session does when its turn comes."""
        (act,) = self._random.choices(list(_WEIGHTS), list(_WEIGHTS.values()))
        return act

    def num_tokens(self) -> int:
        """How many tokens it makes in its turn."""
        return self._random.randint(1, _MAX_TOKENS_AT_ONCE)

    def idle_s(self) -> float:
        """How long it idles: mostly briefly, now and then beyond the server's time to live."""
        return _MAX_IDLE_S * self._random.random() ** 3

    def choose(self, items: Sequence[int]) -> int:
        """One of them."""
        return self._random.choice(items)


def make_prompts(seed: int, count: int, vocab_size: int, max_length: int) -> list[SoakPrompt]:
    """Prompts of all lengths; every other one is sampled, with a seed of its own."""
    draws = random.Random(seed)
    prompts = []
    for number in range(count):
        length = draws.randint(4, max_length)
        # A short alphabet repeats itself, so that guesses are made and some are right.
        tokens = [draws.randrange(1, min(12, vocab_size)) for _ in range(length)]
        temperature = 0.0 if number % 2 == 0 else 0.8
        new_tokens = draws.randint(8, 40)
        prompts.append(
            SoakPrompt(tokens=tokens, new_tokens=new_tokens, temperature=temperature, seed=number)
        )
    return prompts
