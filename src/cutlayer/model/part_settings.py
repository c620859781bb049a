"""Settings of a part of a model that every role has: its files, its numbers, its machine.

Which blocks the part has says each role's own class. It does not load anything.
"""

from enum import StrEnum

from pydantic import Field

from cutlayer.settings import Settings

__all__ = ["PartSettings", "TrunkWeights"]


class TrunkWeights(StrEnum):
    """How the frozen linear layers of a trunk's blocks are kept."""

    FULL = "full"
    INT8 = "int8"
    NF4 = "nf4"

    def told(self, dtype: str) -> str:
        """What the sides compare of a trunk: its compute type, and how its weights are kept."""
        return dtype if self is TrunkWeights.FULL else f"{dtype}/{self}"


class PartSettings(Settings):
    """From which files a part is made, and how it computes."""

    path: str
    """Model folder, GGUF file or hub id."""
    revision: str | None = None
    """Hub revision; a commit hash pins the files."""
    digest: str | None = None
    """Expected model digest (hex); None accepts what both sides' files say."""
    dtype: str = "float32"
    """Compute type, the same at both sides; CPUs without bf16 units want float32."""
    device: str = "cpu"
    """torch device."""
    threads: int | None = Field(default=None, ge=1)
    """Compute threads; None leaves torch's own choice."""
    decode_threads: int | None = Field(default=None, ge=1)
    """Compute threads of decode steps; None takes `threads`. Small models decode fastest with 1."""
