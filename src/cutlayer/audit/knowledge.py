"""What an attacker knows beside the evidence: public weights, the cut, the noise rule.

Adaptive by design: it is told the mechanism and its scale. It never has the noise's secret, a row,
a label or a count of anything that the server does not see.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from functools import cached_property

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from cutlayer.model.checkpoint import load_client_parts, load_part
from cutlayer.model.folder import ModelFolder
from cutlayer.model.partition import Cut, Head, Part, Tail, Trunk
from cutlayer.privacy.mechanism import Mechanism

__all__ = ["CanaryFormat", "Knowledge", "Threat"]


@dataclass(frozen=True, kw_only=True)
class CanaryFormat:
    """What an attacker knows of a canary: the words before it and its form."""

    prefix: tuple[int, ...] = field(repr=False)
    """Tokens before the secret."""
    num_tokens: int
    """Tokens of the secret."""
    alphabet: tuple[int, ...] = field(repr=False)
    """Tokens that it may consist of, such as those of the digits."""


class Threat(StrEnum):
    """Who attacks (docs/threat-model.md)."""

    T1 = "T1"
    """A curious server that knows the public base weights."""
    T2 = "T2"
    """It also has the current adapters of head and tail, from a colluding client."""


@dataclass(frozen=True, kw_only=True)
class Knowledge:
    """What every attack is told."""

    folder: ModelFolder
    """The public model."""
    cut: Cut
    rule: Mechanism
    """What was done at the lower cut."""
    gradient_rule: Mechanism
    """What was done at the upper cut."""
    public_rows: Sequence[Sequence[int]] = field(default=(), repr=False)
    """Token rows of public text of the same kind, for attacks that learn."""
    template: Sequence[int] = field(default=(), repr=False)
    """Tokens that end every row: the owner's prompt, which is no secret; empty where unknown."""
    adapt: Callable[[Head, Tail], None] | None = field(default=None, repr=False)
    """T2: puts the current adapters on the parts; None under T1."""
    adapt_trunk: Callable[[Trunk], None] | None = field(default=None, repr=False)
    """Puts the run's trunk adapter, which any server has, on a trunk; None where there is none."""
    canaries: Sequence[CanaryFormat] = field(default=(), repr=False)
    """What is known of secrets that the owner planted among the rows of the run."""

    @property
    def threat(self) -> Threat:
        """T2 where adapters are known."""
        return Threat.T1 if self.adapt is None else Threat.T2

    @cached_property
    def parts(self) -> tuple[Head, Tail]:
        """Head and tail as the attacker has them, float32, without gradients on weights."""
        head, tail = load_client_parts(self.folder, self.cut, "float32", "cpu")
        if self.adapt is not None:
            self.adapt(head, tail)
        for part in (head, tail):
            part.eval().requires_grad_(False)
        return head, tail

    @cached_property
    def trunk(self) -> Trunk:
        """The trunk with its public weights, which the server hosts anyway."""
        trunk = load_part(self.folder, self.cut, Part.TRUNK)
        assert isinstance(trunk, Trunk)
        trunk.eval().requires_grad_(False)
        return trunk

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The model's tokenizer."""
        return self.folder.tokenizer()

    @property
    def embedding_VD(self) -> Tensor:
        """Rows of the public embedding."""
        weight: Tensor = self.parts[0].base.get_input_embeddings().weight
        return weight.detach()
