"""What one run of the suite is: task, method, sizes and seed. It runs nothing.

Two specs that are equal are the same run: the store keeps one result of each.
"""

import hashlib
from enum import StrEnum
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

__all__ = ["Method", "RunSpec", "Sizes"]

Positive = Annotated[int, Meta(ge=1)]


class Method(StrEnum):
    """How a model comes to its scores."""

    UNTUNED = "untuned"
    """The model as it came; transformers alone."""
    CENTRALISED = "centralised"
    """transformers and PEFT in one process."""
    SPLIT = "split"
    """One owner and a trunk server."""
    TOGETHER = "together"
    """Several owners and a trunk server."""
    AUDIT = "audit"
    """How much of its rows an observer of a split run recovers; no score."""


class Sizes(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How much of everything; equal for all methods of a comparison."""

    train_rows: Positive
    test_rows: Positive
    steps: Positive
    """Optimizer steps."""
    rows_per_step: Positive
    """Over all owners together."""
    micro_batch_rows: Positive
    lr: float
    """Constant learning rate."""
    max_words: Positive | None = None
    """Longer questions (words of all their texts together) are not chosen; None takes all."""


class RunSpec(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One run."""

    task: str
    """Name of a published task."""
    method: Method
    seed: int
    """Of training rows, order, adapter and partition."""
    sizes: Sizes
    source: str = "packaged"
    """Where rows come from: packaged, hub, or a folder with the original files."""
    model: str = "asset:smollm2"
    """Folder, GGUF file, hub id or asset:NAME."""
    form: Literal["plain", "chat", "auto"] = "plain"
    """How the model is spoken to; auto: chat where its tokenizer has a chat template."""
    head_blocks: int = 2
    """Blocks of the head, p."""
    tail_blocks: int = 2
    """Blocks of the tail, q."""
    adapter: str = "lora"
    """Kind of adapter."""
    codec: str = "raw"
    mechanism: str = "none"
    scale: float | None = None
    """Of the mechanism's noise, in its own unit."""
    owners: Positive = 1
    """Of a federation; of a centralised run, whose shared-out rows meet in its steps."""
    alpha: float | None = None
    """Of a Dirichlet distribution of labels over owners; None shares rows out evenly."""
    strategy: str = "every_step"
    """Of a federation."""
    local_steps: Positive = 1
    """Optimizer steps of an owner in a round."""
    in_processes: bool = False
    """Owner and server are processes, so that the owner's memory is measured."""

    @property
    def run_id(self) -> str:
        """Readable name with a digest of everything; a file name."""
        digest = hashlib.sha256(msgspec.json.encode(self, order="deterministic")).hexdigest()[:8]
        return f"{self.task}.{self.label}.s{self.seed}-{digest}"

    @property
    def label(self) -> str:
        """What tells this run's method from others in a table; letters, digits, dot and hyphen."""
        parts = [self.method.value]
        kind = "iid" if self.alpha is None else f"skewed-{self.alpha:g}"
        if self.method is Method.TOGETHER:
            parts += [f"{self.owners}-{kind}", self.strategy.replace("_", "-")]
        elif self.owners > 1:
            parts.append(f"{self.owners}-{kind}-order")
        if (self.head_blocks, self.tail_blocks) != (2, 2):
            parts.append(f"p{self.head_blocks}-q{self.tail_blocks}")
        if self.form != "plain":
            parts.append(self.form)
        if self.adapter != "lora":
            parts.append(self.adapter)
        if self.codec != "raw":
            parts.append(self.codec)
        if self.mechanism != "none":
            scale = "" if self.scale is None else f"-{self.scale:g}"
            parts.append(f"{self.mechanism.replace('_', '-')}{scale}")
        return ".".join(parts)
