"""What a drafter is: it guesses the next tokens of one stream, locally. It verifies nothing.

Shapes: V = vocabulary, K = drafted tokens.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from cutlayer.client.settings import SamplingSettings

__all__ = ["Draft", "DraftWorld", "Drafter", "NextTokenModel"]


@dataclass(frozen=True, eq=False)
class Draft:
    """Guessed tokens, to be verified in one round trip."""

    tokens: tuple[int, ...]
    """In order; may be empty."""
    probabilities_KV: Tensor | None = None
    """The distributions that the tokens were drawn from; None for a drafter that draws nothing."""


class Drafter(Protocol):
    """Guesses for one stream, from its first token to its last."""

    def propose(self, tokens: Sequence[int], num_tokens: int) -> Draft:
        """At most `num_tokens` guesses of what follows; fewer or none where nothing is known.

        Args:
            tokens: prompt and reply so far. From call to call it grows and is not changed
                otherwise; the last one has not been fed to the trunk yet.
            num_tokens: how many guesses are of use.
        """

    def close(self) -> None:
        """Let caches go."""


class NextTokenModel(Protocol):
    """A local model of the same vocabulary that continues one row (`draft_model`)."""

    def extend(self, tokens: Sequence[int]) -> Tensor:
        """Feed tokens, at least one; logits [V] after the last of them."""

    def truncate(self, length: int) -> None:
        """Forget the tokens from `length` on."""

    @property
    def length(self) -> int:
        """Tokens fed so far."""

    @property
    def context_length(self) -> int:
        """Tokens that it can hold."""


@dataclass(frozen=True, kw_only=True)
class DraftWorld:
    """What the drafter of one stream may use; each kind needs a part of it."""

    sampling: SamplingSettings
    """How the stream chooses its tokens."""
    draw: int = 0
    """Number of the stream among those of equal settings, as its sampler has it."""
    least_confidence: float = 0.3
    """self and model: nothing more is guessed where the likeliest token's probability is below."""
    guess: Callable[[int], Tensor] | None = None
    """self: logits [V] after one more token, by head, draft adapter and tail; nothing is sent."""
    forget: Callable[[], None] | None = None
    """self: take back all guesses since the last verified token."""
    model: Callable[[], NextTokenModel] | None = None
    """model: a new row of the small model, which all streams share."""
