"""The same steps of transformers and PEFT on an unsplit model, to compare split training with."""

from pathlib import Path

import torch
from peft import PeftModel
from transformers import PreTrainedModel, get_scheduler

from cutlayer import Client
from cutlayer.data.batches import BatchPlan

__all__ = ["unsplit_losses"]


def unsplit_losses(
    client: Client, adapter: Path, base: PreTrainedModel
) -> tuple[list[float], list[float]]:
    """Losses and norms of `base` with an exported adapter, over the client's own rows and steps."""
    settings = client.settings.train
    assert settings is not None
    assert settings.steps is not None
    num_steps = settings.steps
    peft = PeftModel.from_pretrained(base, adapter, is_trainable=True)
    parameters = [p for p in peft.parameters() if p.requires_grad]
    adamw = torch.optim.AdamW(parameters, lr=settings.lr, weight_decay=0.0)
    schedule = get_scheduler("linear", adamw, settings.warmup_steps, num_steps)
    rows = client.rows().train
    plan = BatchPlan(
        num_rows=len(rows), rows_per_step=settings.rows_per_step, seed=0, steps=num_steps
    )
    losses, norms = [], []
    for step in range(num_steps):
        loss_sum, num_scored = torch.zeros(()), 0
        for index in plan.rows_of(step):
            tokens = torch.tensor([rows[index].tokens])
            labels = torch.tensor(rows[index].labels)
            logits = peft(input_ids=tokens).logits[0, :-1].float()
            loss_sum = loss_sum + torch.nn.functional.cross_entropy(
                logits, labels[1:], ignore_index=-100, reduction="sum"
            )
            num_scored += int((labels[1:] != -100).sum())
        (loss_sum / num_scored).backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(parameters, 1.0)))
        adamw.step()
        schedule.step()
        adamw.zero_grad()
        losses.append(loss_sum.item() / num_scored)
    return losses, norms
