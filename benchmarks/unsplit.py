"""The unsplit model: transformers and PEFT in one process, the floor of time we compare with.

Training: sdpa attention, LoRA r = 8 on all linear layers, AdamW, loss over all tokens. Decoding:
greedy with the library's own KV cache. It does not use any of the product. As a process
(`isolate.run_isolated("benchmarks.unsplit", UnsplitRequest(...), ...)`) its threads are its own.

Shapes: B = rows, S = length.
"""

import time
import warnings
from collections.abc import Sequence
from pathlib import Path

import msgspec
import torch
from peft import LoraConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel

from benchmarks.isolate import answer, read_request
from benchmarks.naive_parts import LORA_ALPHA, LORA_RANK, pad_left

__all__ = [
    "Decoding",
    "Training",
    "UnsplitRequest",
    "main",
    "measure_decoding",
    "measure_training",
    "new_peft_model",
]


class UnsplitRequest(msgspec.Struct, frozen=True, kw_only=True):
    """One measurement by a process of its own."""

    model_folder: str
    rows: list[list[int]]
    """Rows of every training step; for decoding the prompt, alone."""
    steps: int = 0
    """Training steps; 0 means decode."""
    new_tokens: int = 0
    lr: float = 5e-4
    micro_batch_rows: int | None = None
    """Rows of one forward and backward; None is all rows of the step."""
    adapter_file: str | None = None
    """Safetensors with PEFT's own keys to start from; None is a fresh random adapter."""


class Training(msgspec.Struct, frozen=True, kw_only=True):
    """What each step cost."""

    seconds: tuple[float, ...]
    losses: tuple[float, ...]
    """Mean cross entropy over all tokens that have a predecessor."""


class Decoding(msgspec.Struct, frozen=True, kw_only=True):
    """What a greedy generation cost."""

    prefill_s: float
    seconds: tuple[float, ...]
    """Of each token after the first, in a plain loop over the model: the faster way."""
    generate_s: float
    """The same tokens, prefill included, through `model.generate`."""
    tokens: tuple[int, ...]


def measure_training(
    model: PreTrainedModel,
    rows: Sequence[Sequence[int]],
    steps: int,
    lr: float = 5e-4,
    adapter_file: Path | None = None,
    micro_batch_rows: int | None = None,
) -> Training:
    """Time optimizer steps, each on all the rows; the first ones also warm up.

    Args:
        model: a causal language model; it is wrapped by PEFT in place.
        rows: token ids; ragged rows are left-padded and masked, equal rows travel without a mask.
        steps: optimizer steps.
        lr: constant learning rate.
        adapter_file: safetensors with the adapter to start from.
        micro_batch_rows: rows of one forward and backward, whose gradients add up; None is all.
    """
    peft_model = new_peft_model(model)
    if adapter_file is not None:
        set_peft_model_state_dict(peft_model, load_file(adapter_file))
    peft_model.train()
    trainable = [weight for weight in peft_model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=lr)
    micros = _micro_batches(rows, micro_batch_rows or len(rows))
    seconds, losses = [], []
    for _ in range(steps):
        begin_s = time.perf_counter()
        loss_sum = 0.0
        for inputs, share in micros:
            loss: Tensor = peft_model(**inputs, use_cache=False).loss * share
            torch.autograd.backward(loss)
            loss_sum += loss.item()
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.perf_counter() - begin_s)
        losses.append(loss_sum)
    return Training(seconds=tuple(seconds), losses=tuple(losses))


@torch.no_grad()
def measure_decoding(model: PreTrainedModel, prompt: Sequence[int], new_tokens: int) -> Decoding:
    """Time a greedy generation of one row, token by token and through the library's `generate`."""
    model.eval()
    cache = DynamicCache(config=model.config)
    tokens, seconds, new_1S = [], [], torch.tensor([list(prompt)])
    for _ in range(new_tokens):
        begin_s = time.perf_counter()
        output = model(new_1S, past_key_values=cache, use_cache=True, logits_to_keep=1)
        new_1S = output.logits[:, -1:].argmax(dim=-1)
        tokens.append(int(new_1S))
        seconds.append(time.perf_counter() - begin_s)
    return Decoding(
        prefill_s=seconds[0],
        seconds=tuple(seconds[1:]),
        generate_s=_time_generate(model, prompt, new_tokens),
        tokens=tuple(tokens),
    )


def new_peft_model(model: PreTrainedModel) -> PeftModel:
    """The model with fresh LoRA weights on all linear layers, wrapped in place."""
    torch.manual_seed(0)
    config = LoraConfig(r=LORA_RANK, lora_alpha=LORA_ALPHA, target_modules="all-linear")
    with warnings.catch_warnings():
        # PEFT 0.21 asks transformers 5.23 for a property by its old name.
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
        return get_peft_model(model, config)


def _time_generate(model: PreTrainedModel, prompt: Sequence[int], new_tokens: int) -> float:
    tokens_1S = torch.tensor([list(prompt)])
    begin_s = time.perf_counter()
    model.generate(
        tokens_1S,
        attention_mask=torch.ones_like(tokens_1S),
        do_sample=False,
        min_new_tokens=new_tokens,
        max_new_tokens=new_tokens,
        pad_token_id=0,
    )
    return time.perf_counter() - begin_s


def _micro_batches(
    rows: Sequence[Sequence[int]], size: int
) -> list[tuple[dict[str, Tensor], float]]:
    """Inputs of each micro-batch, and its share of the step's scored tokens."""
    chunks = [rows[first : first + size] for first in range(0, len(rows), size)]
    scored = [sum(len(row) - 1 for row in chunk) for chunk in chunks]
    return [
        (_inputs(chunk), count / sum(scored)) for chunk, count in zip(chunks, scored, strict=True)
    ]


def _inputs(rows: Sequence[Sequence[int]]) -> dict[str, Tensor]:
    batch = pad_left(rows)
    if bool(batch.is_real_BS.all()):
        return {"input_ids": batch.tokens_BS, "labels": batch.tokens_BS}
    return {
        "input_ids": batch.tokens_BS,
        # A row's first token would be scored against the padding before it.
        "labels": batch.tokens_BS.masked_fill(batch.positions_BS == 0, -100),
        "attention_mask": batch.is_real_BS,
        "position_ids": batch.positions_BS,
    }


def main() -> None:
    """Answer one `UnsplitRequest` from stdin with `Training` or `Decoding`."""
    request = read_request(UnsplitRequest)
    model = AutoModelForCausalLM.from_pretrained(
        request.model_folder, dtype=torch.float32, attn_implementation="sdpa"
    )
    if request.steps:
        adapter_file = Path(request.adapter_file) if request.adapter_file else None
        answer(
            measure_training(
                model,
                request.rows,
                request.steps,
                request.lr,
                adapter_file,
                request.micro_batch_rows,
            )
        )
        return
    (prompt,) = request.rows
    answer(measure_decoding(model, prompt, request.new_tokens))


if __name__ == "__main__":
    main()
