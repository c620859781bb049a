"""Measurements of the demo: held-out accuracy and loss, and the export against the plain model.

Both sides of every comparison run on the same rows. It does not train.

Shapes: B = rows of one call, V = vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import PeftModel
from torch import Tensor
from torch.nn import functional
from transformers import AutoModelForCausalLM

from cutlayer.client.client import Client
from cutlayer.data.tasks import ChoiceTask, accuracy, predict

__all__ = ["HeldOut", "export_difference", "held_out"]

_ROWS_PER_CALL = 12


@dataclass(frozen=True, kw_only=True)
class HeldOut:
    """Scores on rows that training never sees; one forward per row."""

    accuracy: float
    """Share of rows whose likeliest answer is the right one."""
    loss: float
    """Mean cross entropy of the answer's first token over the whole vocabulary, in nats."""
    num_rows: int


class _Losses:
    """Scores rows, and adds up their losses on the way: the same forward serves both."""

    def __init__(self, client: Client, tasks: Sequence[ChoiceTask]) -> None:
        self._client = client
        self._answers = [task.choices[task.answer][0] for task in tasks]
        self._num_done = 0
        self.total = 0.0

    def score(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        logits_BV = self._client.score(prompts)
        end = self._num_done + len(prompts)
        answers_B = torch.tensor(self._answers[self._num_done : end])
        self.total += float(functional.cross_entropy(logits_BV, answers_B, reduction="sum"))
        self._num_done = end
        return logits_BV


def held_out(client: Client, tasks: Sequence[ChoiceTask]) -> HeldOut:
    """Ask every question over the split model, as the client's settings say, noise included."""
    losses = _Losses(client, tasks)
    predictions = predict(tasks, losses.score, rows_per_call=_ROWS_PER_CALL)
    return HeldOut(
        accuracy=accuracy(tasks, predictions),
        loss=losses.total / len(tasks),
        num_rows=len(tasks),
    )


@torch.inference_mode()
def export_difference(
    client: Client, model: Path, adapter: Path, prompts: Sequence[Sequence[int]]
) -> float:
    """Largest difference of any logit between the split model and transformers with PEFT.

    Args:
        client: without noise and with the codec raw.
        model: the base model's folder.
        adapter: what `Client.export` wrote.
        prompts: rows of token ids.
    """
    split_BV = client.score(prompts)
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    whole = PeftModel.from_pretrained(base, str(adapter)).eval()
    largest = 0.0
    for prompt, split_V in zip(prompts, split_BV, strict=True):
        whole_V = whole(torch.tensor([list(prompt)])).logits[0, -1]
        largest = max(largest, float((whole_V - split_V).abs().max()))
    return largest
