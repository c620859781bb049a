"""What is planned for: rows, steps, prompts, formats and the adapter. It computes nothing."""

from typing import Self

from pydantic import Field, model_validator

from cutlayer.model.adapters import AdapterSettings
from cutlayer.settings import Settings

__all__ = ["Workload"]


class Workload(Settings):
    """One owner's training and generation, as far as its cost depends on it."""

    rows: int | None = Field(default=None, ge=1)
    """Training rows; None leaves the totals of a run out."""
    epochs: int = Field(default=1, ge=1)
    """Times over the rows."""
    mean_length: int = Field(default=128, ge=2)
    """Tokens of a row on average."""
    max_length: int | None = Field(default=None, ge=2)
    """Tokens of the longest row; None takes the mean."""
    scored_share: float = Field(default=1.0, gt=0, le=1)
    """Share of the tokens in the loss: those of the answers."""
    rows_per_step: int = Field(default=8, ge=1)
    """Rows of one optimizer step."""
    micro_batch_rows: int | None = Field(default=None, ge=1)
    """Rows of one call of the trunk; None is all rows of the step."""
    in_flight: int = Field(default=2, ge=1)
    """Micro-batches under way at once."""
    prompt_tokens: int = Field(default=128, ge=1)
    """Tokens of a prompt."""
    new_tokens: int = Field(default=128, ge=1)
    """Tokens of a reply."""
    streams: int = Field(default=1, ge=1)
    """Replies that are generated together."""
    prefill_tokens: int = Field(default=256, ge=1)
    """Prompt tokens of one call of the trunk."""
    codec: str = "bf16"
    """Wire form of hidden states and gradients."""
    dtype: str = "float32"
    """Compute type of all parts."""
    threads: int | None = Field(default=None, ge=1)
    """Compute threads; None leaves torch's own choice."""
    decode_threads: int | None = Field(default=None, ge=1)
    """Compute threads of decode steps; None takes `threads`."""
    adapter: AdapterSettings = AdapterSettings()
    """What is trained."""

    @model_validator(mode="after")
    def _lengths_fit(self) -> Self:
        if self.max_length is not None and self.max_length < self.mean_length:
            raise ValueError(
                f"the longest row of {self.max_length} tokens is shorter than the mean of "
                f"{self.mean_length}"
            )
        return self

    @property
    def longest(self) -> int:
        """Tokens of the longest row."""
        return self.mean_length if self.max_length is None else self.max_length

    @property
    def micro_batches(self) -> tuple[int, ...]:
        """Rows of each micro-batch of a step."""
        size = min(self.micro_batch_rows or self.rows_per_step, self.rows_per_step)
        whole, rest = divmod(self.rows_per_step, size)
        return (size,) * whole + ((rest,) if rest else ())

    @property
    def tokens_per_step(self) -> int:
        """Tokens of one optimizer step, on average."""
        return self.rows_per_step * self.mean_length

    @property
    def usual_lengths(self) -> tuple[int, ...]:
        """Lengths of the rows of a full micro-batch, for its time."""
        return (self.mean_length,) * self.micro_batches[0]

    @property
    def largest_lengths(self) -> tuple[int, ...]:
        """Lengths of the rows of a micro-batch with the longest row, for its memory."""
        return (self.longest, *self.usual_lengths[1:])

    def num_scored(self, num_tokens: int) -> int:
        """Tokens in the loss of so many."""
        return max(1, round(self.scored_share * num_tokens))
