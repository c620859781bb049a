"""Which rows make up a training step, and those rows packed.

A plan is stateless: a step's rows follow from its number alone, so that a resumed run needs no
more than the number. It does not read data nor count what was done.

Shapes: N = tokens of all rows of a micro-batch together.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from itertools import pairwise

import numpy
import torch
from torch import Tensor

from cutlayer.data.template import NOT_SCORED, Example
from cutlayer.errors import ConfigError
from cutlayer.model.rows import Rows, pack

__all__ = ["Batch", "BatchPlan", "batch", "shuffled"]

_EPOCH_STREAM = 1
"""Random streams from here on belong to the epochs; lower ones to other choices."""


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Packed rows with their labels and ids; it never leaves the owner."""

    rows: Rows
    """Layout and tokens."""
    labels_N: Tensor = field(repr=False)
    """Int64, aligned with the tokens, -100 = not scored; position t predicts label t + 1."""
    row_ids: tuple[int, ...]
    """Id of each row, in order."""
    private_N: Tensor = field(repr=False)
    """Bool, whether a token is text of the record, not the template's own."""
    withheld_N: Tensor = field(repr=False)
    """Bool, whether a token's vector stays where a gate withholds."""

    @property
    def num_scored(self) -> int:
        """Tokens that count in the loss."""
        return int((self.labels_N != NOT_SCORED).sum())


@dataclass(frozen=True, kw_only=True)
class BatchPlan:
    """Rows per step, shuffled anew in every epoch, cut into micro-batches."""

    num_rows: int
    """Rows of the data set."""
    rows_per_step: int
    """Rows per optimizer step; the last step of an epoch may have fewer."""
    seed: int = 0
    """Seed of the order."""
    epochs: int | None = None
    """Times over the data; or set `steps`."""
    steps: int | None = None
    """Optimizer steps; the last epoch may stay unfinished."""
    micro_batch_rows: int | None = None
    """Rows per micro-batch at most."""
    micro_batch_tokens: int | None = None
    """Tokens per micro-batch at most, needs `lengths`; a longer row goes alone."""
    lengths: tuple[int, ...] = field(default=(), repr=False)
    """Tokens of every row of the data set; empty where no limit is in tokens."""
    drop_last: bool = False
    """Leave out an epoch's last step where it has fewer rows than the others."""

    def __post_init__(self) -> None:
        if (self.epochs is None) == (self.steps is None):
            raise ConfigError("set epochs or steps, one of the two")
        for name in ("num_rows", "rows_per_step", "epochs", "steps"):
            _check_positive(name, getattr(self, name))
        for name in ("micro_batch_rows", "micro_batch_tokens"):
            _check_positive(name, getattr(self, name))
        if not 0 <= self.seed < 2**64:
            raise ConfigError(f"seed={self.seed} is out of range; choose 0 to 2**64 - 1")
        if self.micro_batch_tokens is not None and len(self.lengths) != self.num_rows:
            raise ConfigError(
                f"micro_batch_tokens needs the length of each of the {self.num_rows} rows, "
                f"got {len(self.lengths)}"
            )
        if self.steps_per_epoch == 0:
            raise ConfigError(
                f"rows_per_step={self.rows_per_step} exceeds the {self.num_rows} rows and "
                "drop_last leaves no step; choose fewer rows per step"
            )

    @cached_property
    def steps_per_epoch(self) -> int:
        """Optimizer steps that see every row once."""
        whole, rest = divmod(self.num_rows, self.rows_per_step)
        return whole + (1 if rest and not self.drop_last else 0)

    @cached_property
    def num_steps(self) -> int:
        """Optimizer steps of the whole run."""
        if self.steps is not None:
            return self.steps
        assert self.epochs is not None
        return self.epochs * self.steps_per_epoch

    def epoch_of(self, step: int) -> int:
        """The epoch, from 0, that a step belongs to."""
        return step // self.steps_per_epoch

    def rows_of(self, step: int) -> tuple[int, ...]:
        """Indices of a step's rows, in the order in which they are packed.

        Args:
            step: number of the step, from 0.

        Raises:
            ConfigError: the plan has no such step.
        """
        if not 0 <= step < self.num_steps:
            raise ConfigError(f"step {step} is not in this plan of {self.num_steps} steps")
        epoch, place = divmod(step, self.steps_per_epoch)
        first = place * self.rows_per_step
        order = shuffled(self.num_rows, self.seed, _EPOCH_STREAM + epoch)
        return order[first : first + self.rows_per_step]

    def micro_batches(self, step: int) -> tuple[tuple[int, ...], ...]:
        """A step's row indices, cut so that each run keeps to the micro-batch limits."""
        rows = self.rows_of(step)
        cuts, num_tokens = [0], 0
        for place, row in enumerate(rows):
            length = self.lengths[row] if self.lengths else 0
            if place > cuts[-1] and self._is_full(place - cuts[-1], num_tokens + length):
                cuts.append(place)
                num_tokens = 0
            num_tokens += length
        return tuple(rows[start:end] for start, end in pairwise([*cuts, len(rows)]))

    def _is_full(self, num_rows: int, num_tokens: int) -> bool:
        """Whether a micro-batch of `num_rows` cannot take the row that makes `num_tokens`."""
        if self.micro_batch_rows is not None and num_rows >= self.micro_batch_rows:
            return True
        return self.micro_batch_tokens is not None and num_tokens > self.micro_batch_tokens


def batch(examples: Sequence[Example], indices: Sequence[int]) -> Batch:
    """Pack the rows at these places.

    Args:
        examples: the whole data set.
        indices: B places in it.
    """
    chosen = [examples[index] for index in indices]
    labels = [label for example in chosen for label in example.labels]
    private = [example.is_private or [True] * len(example.tokens) for example in chosen]
    withheld = [e.is_withheld or flags for e, flags in zip(chosen, private, strict=True)]
    return Batch(
        rows=pack([example.tokens for example in chosen]),
        labels_N=torch.tensor(labels, dtype=torch.int64),
        row_ids=tuple(example.row_id for example in chosen),
        private_N=torch.tensor([flag for row in private for flag in row], dtype=torch.bool),
        withheld_N=torch.tensor([flag for row in withheld for flag in row], dtype=torch.bool),
    )


@lru_cache(maxsize=4)
def shuffled(num_rows: int, seed: int, stream: int) -> tuple[int, ...]:
    """A permutation of range(num_rows) that is the same on every machine and version.

    Args:
        num_rows: how many rows.
        seed: of the run.
        stream: which of the run's permutations.
    """
    # Raw Philox words are stable for ever; a Generator's methods may change between versions.
    key = numpy.array([seed, stream], dtype=numpy.uint64)
    words = numpy.random.Philox(key=key).random_raw(num_rows)
    return tuple(numpy.argsort(words, kind="stable").tolist())


def _check_positive(name: str, value: int | None) -> None:
    if value is not None and value < 1:
        raise ConfigError(f"{name}={value} must be at least 1")
