"""What the client keeps of one row of a session, and what is fed to it next.

It does not compute or send (`session`).
"""

from collections.abc import Sequence
from dataclasses import dataclass

from cutlayer.errors import ConfigError
from cutlayer.model.kv_cache import RowCache
from cutlayer.privacy.budget import SessionBudget
from cutlayer.privacy.history import ReleasedHistory

__all__ = ["CachedRow", "Feed"]


@dataclass(frozen=True, kw_only=True)
class Feed:
    """New tokens of one row."""

    row: int
    tokens: Sequence[int]
    """The row's next tokens, at least one."""
    num_logits: int = 1
    """After how many of the last tokens logits are wanted; all but the first of these tokens are
    guesses that may be taken back."""

    def pieces(self) -> list[Sequence[int]]:
        """Guesses apart: whether a token was guessed or not, its vector then has the same bits."""
        known = len(self.tokens) - max(self.num_logits - 1, 0)
        return [self.tokens[:known], *([token] for token in self.tokens[known:])]


@dataclass(kw_only=True)
class CachedRow:
    """One row: its local caches, what it has released, who pays."""

    max_length: int
    head: RowCache
    tail: RowCache
    budget: SessionBudget
    history: ReleasedHistory
    """What it has released to the first place; its length is the row's."""

    @property
    def length(self) -> int:
        """Tokens that have been released."""
        return self.history.length

    def cut_back(self) -> None:
        """Forget in the local caches what has not been released, or has been truncated."""
        for cache in (self.head, self.tail):
            if cache.length > self.length:
                cache.truncate(self.length)

    def check_room(self, feed: Feed) -> None:
        """Raises ConfigError where the row would grow past its limit."""
        wanted = self.length + len(feed.tokens)
        if wanted > self.max_length:
            raise ConfigError(
                f"row {feed.row} would have {wanted} tokens, it was opened for {self.max_length}; "
                "shorten the prompt or sampling.max_new_tokens"
            )
