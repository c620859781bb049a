"""What an attack is, and the registry of them.

An attack reads evidence and knowledge alone. A new one is a class under `@ATTACKS.register`;
`tests/unit/audit/test_attacks.py` runs over all of them.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Protocol, TypeVar

from cutlayer.audit.evidence import Evidence
from cutlayer.audit.knowledge import Knowledge
from cutlayer.errors import ConfigError

__all__ = [
    "ATTACKS",
    "LATE",
    "Aim",
    "Attack",
    "AttackRegistry",
    "Effort",
    "Guess",
    "TimeLimit",
    "nothing_said",
    "time_limit",
]

LATE = 1.5
"""Share of its time at which an attack also gives up what is quickly read off at the end."""

TimeLimit = Callable[[], bool]
"""Says whether the time is up."""


class Aim(StrEnum):
    """What an attack recovers."""

    TOKENS = "tokens"
    """The token at each position of an observation."""
    BAG = "bag"
    """Which tokens occur, without positions."""
    LABELS = "labels"
    """The scored tokens: for each position the token that it predicts."""
    CANARIES = "canaries"
    """Planted secrets, from what the model has kept of them."""


@dataclass(frozen=True, kw_only=True)
class Guess:
    """What an attack says about one observation, or about an update."""

    number: int
    """`Observation.number`; the round of an update under Aim.BAG, and the place of a format among
    `Knowledge.canaries` under Aim.CANARIES."""
    tokens: tuple[int, ...] = field(repr=False)
    """One per vector of the observation (-1: nothing said); any number under Aim.BAG. Under
    Aim.LABELS entry t is the guessed label at t, as labels are aligned: -1 where not scored."""
    confidences: tuple[float, ...] = field(repr=False)
    """0 to 1, one per token."""
    num_fallbacks: int = 0
    """Positions for which the slow exact search was used."""
    num_unfinished: int = 0
    """Positions that had to take the fast search's best, for want of time."""


@dataclass(frozen=True, kw_only=True)
class Effort:
    """How long an attack may work."""

    seconds: float = 600.0
    """For fit and reconstruct together; what is unfinished then takes the best so far."""
    seed: int = 0
    on_progress: Callable[[float], None] = field(default=lambda share: None, repr=False)
    """Told the share of the work done, 0 to 1."""
    clock_s: Callable[[], float] = field(default=time.monotonic, repr=False)


def nothing_said(number: int, length: int) -> Guess:
    """For an observation of so many vectors that time did not reach."""
    return Guess(
        number=number, tokens=(-1,) * length, confidences=(0.0,) * length, num_unfinished=length
    )


def time_limit(effort: Effort, share: float = 1.0) -> TimeLimit:
    """When an attack that begins now has used so much of its time.

    Args:
        effort: its clock and its seconds.
        share: of the seconds; above 1 for what is quickly read off at the end.
    """
    end_s = effort.clock_s() + share * effort.seconds
    return lambda: effort.clock_s() >= end_s


class Attack(Protocol):
    """Reconstructs what was hidden."""

    aim: Aim
    about: str
    """One line with the source."""

    def reconstruct(self, evidence: Evidence, knowledge: Knowledge, effort: Effort) -> list[Guess]:
        """Guesses for the observations that it can say something about.

        Raises:
            ConfigError: it needs what the evidence or the knowledge does not have; says what.
        """


Maker = Callable[[], Attack]
M = TypeVar("M", bound=Maker)


class AttackRegistry:
    """Attacks by name."""

    def __init__(self) -> None:
        self._makers: dict[str, Maker] = {}

    def register(self, name: str) -> Callable[[M], M]:
        """Class decorator; the class is called without arguments."""

        def add(maker: M) -> M:
            assert name not in self._makers, f"attack {name} is registered twice"
            self._makers[name] = maker
            return maker

        return add

    @property
    def names(self) -> tuple[str, ...]:
        """Registered names, sorted."""
        return tuple(sorted(self._makers))

    def make(self, name: str) -> Attack:
        """The attack of that name.

        Raises:
            ConfigError: the name is unknown.
        """
        if name not in self._makers:
            raise ConfigError(f"attack {name!r} is unknown; known: {', '.join(self.names)}")
        return self._makers[name]()


ATTACKS = AttackRegistry()
