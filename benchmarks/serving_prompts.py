"""Prompts for speculation: replies that repeat their source, and free text.

The passages are news articles of the packaged data, taken in a fixed order; without them, as in a
smoke run, a few lines of our own. It does not generate and knows no network.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from transformers import PreTrainedTokenizerBase

__all__ = ["Prompt", "Style", "copied_share", "free_prompts", "long_prompt", "source_prompts"]

_COPIED_RUN = 4
"""So many tokens in a row that the prompt has too count as copied."""


class Style(StrEnum):
    """What a prompt asks for."""

    COQA = "CoQA-style"
    SUMMARY = "summarisation-style"
    FREE = "free text"


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """Something to continue."""

    style: Style
    tokens: list[int]


_OWN_PASSAGE = (
    "The harbour of the small town lies behind a long stone wall. Every morning the boats leave "
    "it before the sun is up, and every evening they come back with what they have caught. The "
    "keeper of the light counts them from his window. Last winter a storm broke the wall in two "
    "places, and the town voted to build it again with stones from the old quarry."
)
_QUESTION = (
    "Answer the question with the exact words of the passage.\n\nQuestion: what does the passage "
    "say?"
)
_SUMMARY = (
    "Answer with the exact words of the passage.\n\nQuestion: what is the summary of the passage, "
    "in its own sentences?"
)
_NUM_FIRST_WORDS = 6
"""Words of the passage with which the reply is made to begin: a small model then copies on."""
_FREE = (
    "Write a story about a lighthouse keeper who finds a letter in a bottle.",
    "Invent a new holiday, and tell how people celebrate it.",
    "Describe a dream about a city under the sea.",
)


def source_prompts(
    tokenizer: PreTrainedTokenizerBase, texts: Path | None, max_tokens: int, per_style: int
) -> list[Prompt]:
    """Prompts whose replies repeat a passage.

    Args:
        tokenizer: of the model.
        texts: folder of articles; None takes a passage of our own.
        max_tokens: of a passage.
        per_style: prompts of each of the two styles.
    """
    passages = _passages(tokenizer, texts, max_tokens)
    found = []
    for style in [Style.COQA] * per_style + [Style.SUMMARY] * per_style:
        text = next(passages)
        asked = f"{text}\n\n{_QUESTION if style is Style.COQA else _SUMMARY}"
        begin = " ".join(text.split(" ")[:_NUM_FIRST_WORDS])
        found.append(Prompt(style=style, tokens=_ask(tokenizer, asked, begin)))
    return found


def free_prompts(tokenizer: PreTrainedTokenizerBase, count: int) -> list[Prompt]:
    """Prompts whose replies repeat nothing."""
    return [
        Prompt(style=Style.FREE, tokens=_ask(tokenizer, _FREE[number % len(_FREE)]))
        for number in range(count)
    ]


def long_prompt(
    tokenizer: PreTrainedTokenizerBase, texts: Path | None, num_tokens: int
) -> list[int]:
    """A prompt of exactly so many tokens whose reply repeats its passage."""
    request = "Copy the following article word for word.\n\n"
    passages = _passages(tokenizer, texts, 2 * num_tokens)
    text = next(passages)
    while len(_ask(tokenizer, request + text)) < num_tokens:
        text = f"{text}\n\n{next(passages)}"
    frame = _ask(tokenizer, request + "\N{OBJECT REPLACEMENT CHARACTER}")
    body = _ask(tokenizer, request + text)
    # The frame's end stays: it is where the model is asked to answer.
    num_after = _num_common_end(frame, body)
    return [*body[: num_tokens - num_after], *body[len(body) - num_after :]]


def copied_share(prompt: Sequence[int], reply: Sequence[int]) -> float:
    """Share of a reply's tokens that lie in runs of four which the prompt has too."""
    runs = {tuple(prompt[n : n + _COPIED_RUN]) for n in range(len(prompt) - _COPIED_RUN + 1)}
    is_copied = [False] * len(reply)
    for start in range(len(reply) - _COPIED_RUN + 1):
        if tuple(reply[start : start + _COPIED_RUN]) in runs:
            is_copied[start : start + _COPIED_RUN] = [True] * _COPIED_RUN
    return sum(is_copied) / max(1, len(reply))


def _passages(
    tokenizer: PreTrainedTokenizerBase, texts: Path | None, max_tokens: int
) -> Iterator[str]:
    """Beginnings of articles, one topic after the other, cut at the end of a sentence."""
    if texts is None:
        while True:
            yield _shortened(tokenizer, _OWN_PASSAGE, max_tokens)
    topics = [sorted(folder.glob("*.txt")) for folder in sorted(texts.iterdir())]
    for files in zip(*topics, strict=False):
        for file in files:
            text = " ".join(file.read_text(errors="replace").split())
            yield _shortened(tokenizer, text, max_tokens)


def _shortened(tokenizer: PreTrainedTokenizerBase, text: str, max_tokens: int) -> str:
    tokens = tokenizer.encode(text, add_special_tokens=False)
    if len(tokens) <= max_tokens:
        return text
    cut = str(tokenizer.decode(tokens[:max_tokens]))
    end = cut.rfind(". ")
    return cut[: end + 1] if end > 0 else cut


def _ask(tokenizer: PreTrainedTokenizerBase, text: str, begin: str = "") -> list[int]:
    """As the model's chat template asks, as plain text where it has none; and the reply's begin."""
    if tokenizer.chat_template is not None:
        turns = [{"role": "user", "content": text}]
        text = str(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True))
    return list(tokenizer.encode(text + begin, add_special_tokens=False))


def _num_common_end(one: Sequence[int], other: Sequence[int]) -> int:
    count = 0
    while count < min(len(one), len(other)) and one[-1 - count] == other[-1 - count]:
        count += 1
    return count
