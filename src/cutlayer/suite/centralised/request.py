"""What the script is asked; it does nothing but refuse."""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn, TypedDict

__all__ = ["Adapter", "Item", "Message", "Request", "Row", "read_request", "refuse"]


class Message(TypedDict):
    """A turn of a conversation."""

    role: str
    content: str


class Row(TypedDict, total=False):
    """A line of train.jsonl: prompt and completion, or messages that end with the answer."""

    prompt: str
    completion: str
    messages: list[Message]


class Item(TypedDict, total=False):
    """A line of test.jsonl: context or messages with choices, or prompt or messages to answer."""

    kind: str
    context: str
    prompt: str
    messages: list[Message]
    choices: list[str]
    max_new_tokens: int
    stop: list[str]


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """What is trained, and from where."""

    kind: str
    """lora or prefix."""
    file: str
    """Safetensors with PEFT's own keys: the initial weights."""
    rank: int
    alpha: float
    num_virtual_tokens: int


@dataclass(frozen=True, kw_only=True)
class Request:
    """What is asked; REQUEST.json has these keys."""

    model: str
    """Folder."""
    threads: int
    device: str
    """torch device."""
    train: str
    """File with rows."""
    test: str
    """File with items."""
    context_length: int
    """Tokens of an item at most, its answer included."""
    max_length: int
    """Tokens of a row at most; a longer one loses the beginning of its prompt."""
    append_eos: bool
    """Learn the end of text after a completion; rows of messages have their template's own."""
    order: list[list[int]]
    """Rows of every optimizer step; none scores the model as it is."""
    micro_batch_rows: int
    lr: float
    betas: list[float]
    eps: float
    weight_decay: float
    clip_norm: float
    adapter: Adapter | None
    """None: the model as it is."""


def read_request(path: Path) -> Request:
    """The request of a file."""
    given = json.loads(path.read_text(encoding="utf-8"))
    if given["adapter"] is not None:
        given["adapter"] = Adapter(**given["adapter"])
    return Request(**given)


def refuse(message: str) -> NoReturn:
    """End with status 2: not a fault of this script."""
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)
