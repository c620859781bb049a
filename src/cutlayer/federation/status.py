"""Where a federation stands, for pages. It is made by the coordinator and changes nothing."""

from dataclasses import dataclass

__all__ = ["Status"]


@dataclass(frozen=True, kw_only=True)
class Status:
    """A moment of a federation."""

    federation: str
    round: int
    """The last finished round."""
    rounds: int
    """Rounds to train."""
    stage: str
    """`gathering`, `finished`, `stopped`, or the open stage of the attempt: `keys`, `secrets`,
    `updates` (training), `unmask`."""
    attempt: int
    """Of the round after `round`; 0 while none runs."""
    cohort: tuple[str, ...]
    came: tuple[str, ...]
    """Members of the cohort whose part of the open stage is in."""
    waiting: tuple[str, ...]
    """Who waits for a round."""
    stopped: str
    """Why the federation stopped; empty if it did not."""
