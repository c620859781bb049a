"""One stream of generation: what is asked for, what has come, and how it ended.

It does not compute (`decoder`), choose tokens (`sampling`) nor know text (`chat`).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum

from cutlayer.client.settings import SamplingSettings
from cutlayer.errors import CutlayerError

__all__ = ["Finish", "NewToken", "Request", "Stream"]


class Finish(StrEnum):
    """Why a stream came to its end."""

    STOP = "stop"
    """An end-of-text token, or a stop text."""
    LENGTH = "length"
    """`max_new_tokens`."""
    CANCELLED = "cancelled"
    """Whoever asked has gone."""
    DEADLINE = "deadline"
    """Its time was up."""
    ERROR = "error"
    """Its `error` says why."""


@dataclass(frozen=True, kw_only=True)
class NewToken:
    """One chosen token."""

    token: int
    logprob: float | None = None
    """Natural logarithm of its probability under the model's own softmax, where asked for."""
    top: tuple[tuple[int, float], ...] = ()
    """The likeliest tokens at its place and their log-probabilities, where asked for."""


def _never(new: NewToken) -> bool:
    return False


@dataclass(frozen=True, kw_only=True)
class Request:
    """One row to continue."""

    prompt: Sequence[int]
    """Token ids, at least one."""
    sampling: SamplingSettings
    """How to choose, and how many tokens at most; its `stop` texts are the watcher's affair."""
    eos_ids: frozenset[int] = frozenset()
    """Tokens that end the stream; they are not delivered."""
    watch: Callable[[NewToken], bool] = _never
    """Told each token as it is chosen, on the decoder's thread; True ends the stream after it."""
    draw: int = 0
    """Streams of equal settings draw apart by this number, as rows of a batch do."""
    num_top: int | None = None
    """Log-probabilities wanted: None for none, else how many of the likeliest tokens."""
    deadline_s: float | None = None
    """When it ends at the latest, on the decoder's clock."""


@dataclass(kw_only=True)
class Stream:
    """A request under way. The decoder alone changes it."""

    request: Request
    tokens: list[int] = field(default_factory=list)
    """Delivered so far, without the prompt."""
    finish: Finish | None = None
    """None while it goes on."""
    error: CutlayerError | None = None
    """What it failed with."""
    num_cached: int = 0
    """Tokens of the prompt that were cached already and were not sent again."""
    num_drafted: int = 0
    """Drafted tokens that were sent for verification."""
    num_accepted: int = 0
    """Those of them that the model chose too."""
    num_round_trips: int = 0
    """Calls of the trunk that it took part in."""

    @property
    def has_ended(self) -> bool:
        """Whether nothing more will come."""
        return self.finish is not None
