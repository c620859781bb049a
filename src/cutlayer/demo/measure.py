"""Measurement of the demo: the export against the plain model, and what `simulation` scores.

Both sides of every comparison run on the same rows. It does not train.

Shapes: B = rows of one call, V = vocabulary.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from cutlayer.client.client import Client
from cutlayer.simulation.heldout import HeldOut, held_out

__all__ = ["HeldOut", "export_difference", "held_out"]


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
