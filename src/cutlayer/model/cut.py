"""Words for where a model is cut: parts, and the two block indices of a U.

It builds nothing (`partition`); who runs which blocks is in `chain`.
"""

from dataclasses import dataclass
from enum import StrEnum

from cutlayer.errors import ConfigError

__all__ = ["Cut", "Part"]


class Part(StrEnum):
    """One of the three pieces of a U-shaped split."""

    HEAD = "head"
    TRUNK = "trunk"
    TAIL = "tail"


@dataclass(frozen=True)
class Cut:
    """The two block indices where a model of n blocks is cut: 0 <= lower < upper <= n."""

    lower: int
    """First block of the trunk; 0 leaves the head with the embedding alone."""
    upper: int
    """First block of the tail; n leaves the tail with the norm and the LM head alone."""

    def __post_init__(self) -> None:
        if not 0 <= self.lower < self.upper:
            raise ConfigError(
                f"cut.lower={self.lower}, cut.upper={self.upper}: the trunk needs at least one "
                "block; choose 0 <= lower < upper"
            )

    def check(self, num_blocks: int) -> None:
        """Check the cut against a model.

        Raises:
            ConfigError: it exceeds the model's blocks.
        """
        if self.upper > num_blocks:
            raise ConfigError(
                f"cut.upper={self.upper} exceeds the model's {num_blocks} blocks; "
                f"choose at most {num_blocks}"
            )

    @property
    def trunk(self) -> range:
        """Global indices of the trunk's blocks."""
        return range(self.lower, self.upper)

    def is_within(self, other: "Cut") -> bool:
        """Whether a trunk of the other cut holds all blocks of this one's."""
        return other.lower <= self.lower and self.upper <= other.upper

    def blocks(self, part: Part, num_blocks: int) -> range:
        """Global indices of a part's blocks."""
        self.check(num_blocks)
        edges = {
            Part.HEAD: range(self.lower),
            Part.TRUNK: self.trunk,
            Part.TAIL: range(self.upper, num_blocks),
        }
        return edges[part]
