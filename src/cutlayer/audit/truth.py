"""What was hidden behind observations; only the owner has it, and only scoring needs it.

It does not read files (`truth_file`) and no attack may see it.
"""

from dataclasses import dataclass, field

from cutlayer.model.loss import NOT_SCORED

__all__ = ["Hidden"]


@dataclass(frozen=True, kw_only=True)
class Hidden:
    """One observation's row, or under Aim.BAG everything that took part in one round."""

    tokens: tuple[int, ...] = field(repr=False)
    """One per vector of the observation."""
    labels: tuple[int, ...] = field(default=(), repr=False)
    """As labels are aligned, -100 where not scored; empty: nothing is."""
    private: tuple[bool, ...] = field(default=(), repr=False)
    """Whether each token is text of the record, not the template's own; empty: all are."""
    row_id: str = ""
    """Name of the row in its run: a private token counts once, however often the row left.
    Empty: this observation is a row by itself."""

    def private_places(self) -> list[int]:
        """Places of private tokens."""
        flags = self.private or (True,) * len(self.tokens)
        return [place for place, flag in enumerate(flags) if flag]

    def label_places(self) -> list[int]:
        """Places of private tokens that are scored; a row's first has no predictor."""
        if not self.labels:
            return []
        return [p for p in self.private_places() if p and self.labels[p] != NOT_SCORED]
