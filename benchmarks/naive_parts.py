"""The naive baseline's three parts and its mask forms: padded batches, ordinary transformers.

Every part is the architecture's own base model with its layer list sliced; it takes the mask that
travelled. It does not pack rows, keep caches or talk. Models of the usual layout only
(`model.model.layers`, `.norm`, `.embed_tokens`): it exists to be measured, not to be general.

Shapes: B = rows, S = padded length, H = hidden size, V = vocabulary.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

__all__ = ["LORA_TARGETS", "MASK_FORMS", "Batch", "NaivePart", "completion_loss", "pad_left"]

PUBLISHED_MAX_LENGTH = 4096
"""Side of the mask that the published system sends, whatever the length of the rows."""
LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
LORA_RANK, LORA_ALPHA = 8, 16


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Rows left-padded to one length."""

    tokens_BS: Tensor
    """int64; 0 where there is padding."""
    is_real_BS: Tensor
    """int64, 1 for a token and 0 for padding: the attention mask that tokenizers make."""

    @property
    def positions_BS(self) -> Tensor:
        """Position of each token within its row; 0 on padding."""
        return (self.is_real_BS.cumsum(dim=1) - 1).clamp(min=0)


def pad_left(rows: Sequence[Sequence[int]], length: int | None = None) -> Batch:
    """Left-pad rows of token ids to `length`, or to the longest."""
    length = length or max(map(len, rows))
    tokens = [[0] * (length - len(row)) + list(row) for row in rows]
    is_real = [[0] * (length - len(row)) + [1] * len(row) for row in rows]
    return Batch(tokens_BS=torch.tensor(tokens), is_real_BS=torch.tensor(is_real))


@dataclass(frozen=True, kw_only=True)
class MaskForm:
    """How the attention mask travels."""

    make: Callable[[Tensor], Tensor]
    """From is_real [B, S] to what is sent."""
    use: Callable[[Tensor, int], Tensor]
    """From what was sent and S to what transformers takes."""


def _dense(is_real_BS: Tensor, side: int) -> Tensor:
    """Additive causal mask [B, 1, side, side]; beyond S everything is masked."""
    num_rows, length = is_real_BS.shape
    blocked = torch.finfo(torch.float32).min
    mask = torch.full((num_rows, 1, side, side), blocked, dtype=torch.float32)
    causal_SS = torch.ones(length, length, dtype=torch.bool).tril()
    allowed_BSS = causal_SS[None] & is_real_BS.bool()[:, None, :]
    mask[:, 0, :length, :length].masked_fill_(allowed_BSS, 0.0)
    return mask


def _lengths_to_2d(lengths_B: Tensor, length: int) -> Tensor:
    return (torch.arange(length)[None] >= length - lengths_B[:, None]).long()


MASK_FORMS: dict[str, MaskForm] = {
    "dense-max": MaskForm(
        make=lambda real_BS: _dense(real_BS, max(PUBLISHED_MAX_LENGTH, real_BS.shape[1])),
        use=lambda mask, length: mask[:, :, :length, :length],
    ),
    "dense-s": MaskForm(
        make=lambda real_BS: _dense(real_BS, real_BS.shape[1]), use=lambda mask, length: mask
    ),
    "2d": MaskForm(make=lambda real_BS: real_BS, use=lambda mask, length: mask),
    "lengths": MaskForm(make=lambda real_BS: real_BS.sum(dim=1), use=_lengths_to_2d),
}
"""Mask forms by name; `dense-max` as published, `dense-s` the fair modern form."""


class NaivePart(nn.Module):
    """One run of blocks of a model, with the embedding or the LM head where they belong.

    Args:
        folder: plain transformers model folder.
        blocks: global indices of its blocks; at least one, or there is nothing to train.
        seed: of the LoRA weights.
    """

    def __init__(self, folder: Path, blocks: range, seed: int = 0) -> None:
        super().__init__()
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="sdpa"
        )
        model.requires_grad_(False)
        num_blocks: int = model.config.num_hidden_layers
        self.num_blocks = num_blocks
        self.base: nn.Module = model.model
        self.base.layers = nn.ModuleList(list(model.model.layers)[blocks.start : blocks.stop])
        if blocks.start > 0:
            self.base.embed_tokens = None
        self.lm_head: nn.Module | None = model.lm_head if blocks.stop == num_blocks else None
        if blocks.stop < num_blocks:
            self.base.norm = nn.Identity()
        _add_lora(self.base, seed)

    def forward(self, x: Tensor, mask: Tensor, positions_BS: Tensor) -> Tensor:
        """Tokens [B, S] or hidden states [B, S, H] in, hidden states [B, S, H] out."""
        name = "input_ids" if x.dtype == torch.int64 else "inputs_embeds"
        inputs = {name: x, "attention_mask": mask, "position_ids": positions_BS}
        hidden_BSH: Tensor = self.base(**inputs, use_cache=False).last_hidden_state
        return hidden_BSH

    def trainable(self) -> list[nn.Parameter]:
        """The LoRA weights."""
        return [parameter for parameter in self.parameters() if parameter.requires_grad]


def completion_loss(tail: NaivePart, hidden_BSH: Tensor, batch: Batch) -> Tensor:
    """Mean cross entropy over every real token that has a predecessor in its row."""
    assert tail.lm_head is not None
    logits_BSV = tail.lm_head(hidden_BSH[:, :-1])
    is_scored_BS = batch.is_real_BS[:, :-1].bool()
    labels_N = batch.tokens_BS[:, 1:][is_scored_BS]
    return nn.functional.cross_entropy(logits_BSV[is_scored_BS].float(), labels_N)


def _add_lora(base: nn.Module, seed: int) -> None:
    torch.manual_seed(seed)
    config = LoraConfig(r=LORA_RANK, lora_alpha=LORA_ALPHA, target_modules=list(LORA_TARGETS))
    inject_adapter_in_model(config, base)
