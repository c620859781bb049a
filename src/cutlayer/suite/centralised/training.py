"""PEFT's adapter on the model, and AdamW on it; it reads no rows and scores nothing.

Shapes: B = rows, S = length, L = positions whose logits are wanted, V = vocabulary.
"""

import math
from collections.abc import Sequence

import torch
from peft import (
    LoraConfig,
    PeftModel,
    PrefixTuningConfig,
    TaskType,
    get_peft_model,
    set_peft_model_state_dict,
)
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel

from .request import Adapter, Request, refuse
from .tokens import IGNORED, Learnt, inputs, padded

__all__ = ["train", "with_adapter"]


def train(model: PreTrainedModel | PeftModel, rows: list[Learnt], request: Request) -> list[float]:
    """AdamW on the mean over each step's scored tokens; that mean of every step.

    A base model with dropout of its own, such as GPT-2, drops other places than the split one does.
    """
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(
        trained,
        lr=request.lr,
        betas=(request.betas[0], request.betas[1]),
        eps=request.eps,
        weight_decay=request.weight_decay,
    )
    model.train()
    losses = []
    for number, step in enumerate(request.order, 1):
        chosen, loss_sum = [rows[place] for place in step], 0.0
        num_scored = sum(label != IGNORED for row in chosen for label in row.labels)
        for first in range(0, len(chosen), request.micro_batch_rows):
            loss = _loss_sum(model, chosen[first : first + request.micro_batch_rows])
            torch.autograd.backward(loss / num_scored)
            loss_sum += loss.item()
        if not math.isfinite(loss_sum):
            refuse(f"the loss of step {number} is {loss_sum}; lower the learning rate")
        torch.nn.utils.clip_grad_norm_(trained, request.clip_norm)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss_sum / num_scored)
    return losses


def _loss_sum(model: PreTrainedModel | PeftModel, rows: Sequence[Learnt]) -> Tensor:
    """Cross entropy over all scored tokens of some rows, summed."""
    labels_BS = padded([row.labels for row in rows], IGNORED)[:, 1:]
    wanted_L = (labels_BS != IGNORED).any(dim=0).nonzero().squeeze(1)
    logits_BLV = model(
        **inputs([row.tokens for row in rows]), use_cache=False, logits_to_keep=wanted_L
    ).logits
    return torch.nn.functional.cross_entropy(
        logits_BLV.flatten(0, 1).float(),
        labels_BS[:, wanted_L].flatten(),
        ignore_index=IGNORED,
        reduction="sum",
    )


def with_adapter(base: PreTrainedModel, adapter: Adapter) -> PeftModel:
    if adapter.kind == "lora":
        config = LoraConfig(r=adapter.rank, lora_alpha=adapter.alpha, target_modules="all-linear")
        config.task_type = TaskType.CAUSAL_LM
    else:
        config = PrefixTuningConfig(
            task_type=TaskType.CAUSAL_LM, num_virtual_tokens=adapter.num_virtual_tokens
        )
    model, given = get_peft_model(base, config), load_file(adapter.file)
    num_own = sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
    num_given = sum(weight.numel() for weight in given.values())
    if num_own != num_given:
        refuse(f"PEFT's {adapter.kind} has {num_own} numbers here, the split one {num_given}")
    found = set_peft_model_state_dict(model, given)
    # Of a prefix PEFT loads the one tensor strictly, and then calls its name unexpected.
    if adapter.kind == "lora" and found.unexpected_keys:
        refuse(f"PEFT's {adapter.kind} has no {found.unexpected_keys[0]}")
    return model
