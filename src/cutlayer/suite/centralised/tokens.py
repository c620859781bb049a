"""Rows and items of files as token ids, and those as tensors; it runs no model.

Shapes: B = rows, S = length.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from .request import Item, Message, Request, Row, refuse

__all__ = ["IGNORED", "Asked", "Learnt", "batches", "inputs", "items_of", "padded", "rows_of"]

IGNORED = -100
"""Label of a token that the loss leaves out."""

_MAX_TOKENS, _MAX_ROWS = 2048, 16
"""Of one call of the model."""


@dataclass(frozen=True, kw_only=True)
class Learnt:
    """A row in tokens."""

    tokens: list[int]
    labels: list[int]
    """Aligned with the tokens: the token where it is scored, else -100."""


@dataclass(frozen=True, kw_only=True)
class Asked:
    """An item in tokens."""

    context: list[int]
    choices: list[list[int]]
    """Empty: a reply is written."""
    num_new: int
    """Tokens of a reply at most."""
    stop: list[str]


def _lines(path: str) -> Iterator[tuple[str, str]]:
    for number, line in enumerate(Path(path).read_text(encoding="utf-8").split("\n"), 1):
        if line.strip():
            yield f"{path}:{number}", line


def rows_of(tokenizer: PreTrainedTokenizerBase, request: Request) -> list[Learnt]:
    return [_row(tokenizer, request, json.loads(line), at) for at, line in _lines(request.train)]


def _row(tokenizer: PreTrainedTokenizerBase, request: Request, row: Row, where: str) -> Learnt:
    """Start tokens, prompt, completion, end; too long a prompt loses its beginning."""
    is_chat = "messages" in row
    start = [] if is_chat else _start_tokens(tokenizer)
    before, after = _turns(tokenizer, row) if is_chat else (row["prompt"], row["completion"])
    prompt, completion = _encoded(tokenizer, before, after)
    if is_chat and tokenizer.eos_token_id in completion:
        # What a template writes after the end of the turn is never learnt.
        completion = completion[: len(completion) - completion[::-1].index(tokenizer.eos_token_id)]
    elif request.append_eos and not is_chat:
        completion = [*completion, tokenizer.eos_token_id]
    excess = max(0, len(start) + len(prompt) + len(completion) - request.max_length)
    if excess > len(start) + len(prompt) - max(1, len(start)):
        refuse(f"{where}: the completion alone does not fit in {request.max_length} tokens")
    prompt = prompt[excess:]
    labels = [IGNORED] * len(start + prompt) + completion
    return Learnt(tokens=start + prompt + completion, labels=[IGNORED, *labels[1:]])


def _turns(tokenizer: PreTrainedTokenizerBase, row: Row) -> tuple[str, str]:
    """A conversation up to its last answer, and that answer as the template writes it."""
    before = _rendered(tokenizer, row["messages"][:-1])
    whole = str(tokenizer.apply_chat_template(row["messages"], tokenize=False))
    if not whole.startswith(before):
        refuse("the chat template changes earlier turns when an answer is added")
    return before, whole[len(before) :]


def _rendered(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> str:
    rendered = tokenizer.apply_chat_template(
        list(messages), tokenize=False, add_generation_prompt=True
    )
    return str(rendered)


def _encoded(
    tokenizer: PreTrainedTokenizerBase, before: str, after: str
) -> tuple[list[int], list[int]]:
    """Two texts in a row, so that the first has the tokens that it has alone."""
    first: list[int] = tokenizer.encode(before, add_special_tokens=False)
    whole: list[int] = tokenizer.encode(before + after, add_special_tokens=False)
    if whole[: len(first)] == first:
        return first, whole[len(first) :]
    return first, tokenizer.encode(after, add_special_tokens=False)


def _start_tokens(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Special tokens that the tokenizer puts before a text."""
    bare: list[int] = tokenizer.encode("a", add_special_tokens=False)
    full: list[int] = tokenizer.encode("a", add_special_tokens=True)
    firsts = [n for n in range(len(full)) if full[n : n + len(bare)] == bare]
    return full[: firsts[0]] if firsts else []


def items_of(tokenizer: PreTrainedTokenizerBase, request: Request) -> list[Asked]:
    items = []
    for where, line in _lines(request.test):
        asked = _item(tokenizer, json.loads(line))
        longest = max((len(choice) - 1 for choice in asked.choices), default=asked.num_new)
        if len(asked.context) + longest > request.context_length:
            refuse(f"{where}: longer than the model's context of {request.context_length} tokens")
        items.append(asked)
    return items


def _item(tokenizer: PreTrainedTokenizerBase, item: Item) -> Asked:
    is_chat = "messages" in item
    text = _rendered(tokenizer, item["messages"]) if is_chat else ""
    text = text or item.get("context", "") or item.get("prompt", "")
    # A chat template writes its own special tokens.
    context = tokenizer.encode(text, add_special_tokens=not is_chat)
    return Asked(
        context=context,
        choices=[_encoded(tokenizer, text, choice)[1] for choice in item.get("choices", [])],
        num_new=item.get("max_new_tokens", 64),
        stop=item.get("stop", []),
    )


def inputs(rows: Sequence[Sequence[int]]) -> dict[str, Tensor]:
    """Padded at the right: positions and what a token attends to are those of a row alone."""
    is_real_BS = padded([[1] * len(row) for row in rows], 0)
    return {"input_ids": padded(rows, 0), "attention_mask": is_real_BS}


def padded(rows: Sequence[Sequence[int]], fill: int, *, at_left: bool = False) -> Tensor:
    length = max(map(len, rows))
    fills = [[fill] * (length - len(row)) for row in rows]
    pairs = zip(rows, fills, strict=True)
    return torch.tensor([[*f, *row] if at_left else [*row, *f] for row, f in pairs])


def batches(asked: Sequence[Asked], numbers: Sequence[int]) -> Iterator[list[int]]:
    """Items of like length together, longest first."""
    batch: list[int] = []
    for number in sorted(numbers, key=lambda n: -len(asked[n].context)):
        longest = len(asked[batch[0]].context) if batch else 0
        if batch and (len(batch) == _MAX_ROWS or longest * (len(batch) + 1) > _MAX_TOKENS):
            yield batch
            batch = []
        batch.append(number)
    if batch:
        yield batch
