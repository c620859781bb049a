"""Greedy replies by the library's own loop; it scores none.

Shapes: B = rows, S = length.
"""

from collections.abc import Sequence

import torch
from peft import PeftModel
from torch import Tensor
from transformers import (
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteria,
)

from .request import Request
from .tokens import Asked, batches, padded

__all__ = ["StopTexts", "write_replies"]

_END_OF_TURN = ("<|im_end|>", "<|eot_id|>", "<end_of_turn>", "<|end|>", "<|endoftext|>")
"""Tokens that end a reply, besides the tokenizer's own end of text."""


class StopTexts(StoppingCriteria):  # type: ignore[misc]  # transformers has no types
    """Ends a row of a batch once its reply has one of its stop texts."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, length: int, stops: Sequence[Sequence[str]]
    ) -> None:
        self._tokenizer, self._length, self._stops = tokenizer, length, stops

    def __call__(self, input_ids: Tensor, scores: Tensor, **_: object) -> Tensor:
        """Whether each row has ended."""
        replies = [_decoded(self._tokenizer, row[self._length :].tolist()) for row in input_ids]
        pairs = zip(replies, self._stops, strict=True)
        return torch.tensor([any(s in reply for s in stops) for reply, stops in pairs])


def write_replies(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    asked: Sequence[Asked],
    request: Request,
) -> dict[int, str]:
    """Greedy replies by the library's own loop, by the item's number."""
    # A prefix counts positions from the first column, so its rows cannot be padded at the left.
    is_alone = request.adapter is not None and request.adapter.kind == "prefix"
    replies: dict[int, str] = {}
    lengths = {item.num_new for item in asked if not item.choices}
    for length in lengths:
        numbers = [n for n, item in enumerate(asked) if not item.choices and item.num_new == length]
        for batch in [[n] for n in numbers] if is_alone else batches(asked, numbers):
            written = _generate(model, tokenizer, [asked[n] for n in batch])
            replies |= zip(batch, written, strict=True)
    return replies


def _generate(
    model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase, asked: Sequence[Asked]
) -> list[str]:
    ends, contexts = _ends(tokenizer), [item.context for item in asked]
    padding = ends[0] if ends else 0
    input_BS = padded(contexts, padding, at_left=True)
    length, stops = input_BS.shape[1], [item.stop for item in asked]
    # The model's own settings may sample, or punish repetition.
    model.generation_config = GenerationConfig()
    output_BS = model.generate(
        input_ids=input_BS,
        attention_mask=padded([[1] * len(row) for row in contexts], 0, at_left=True),
        max_new_tokens=asked[0].num_new,
        do_sample=False,
        eos_token_id=ends or None,
        pad_token_id=padding,
        stopping_criteria=[StopTexts(tokenizer, length, stops)] if any(stops) else None,
    )
    return [
        _cut(tokenizer, row[length:].tolist(), ends, item.stop)
        for row, item in zip(output_BS, asked, strict=True)
    ]


def _ends(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    vocabulary = tokenizer.get_vocab()
    found = {vocabulary[name] for name in _END_OF_TURN if name in vocabulary}
    return sorted(found | {tokenizer.eos_token_id} - {None})


def _cut(
    tokenizer: PreTrainedTokenizerBase, tokens: list[int], ends: list[int], stop: Sequence[str]
) -> str:
    """A reply without its end and without what follows a stop text."""
    places = [place for place, token in enumerate(tokens) if token in ends]
    text = _decoded(tokenizer, tokens[: places[0]] if places else tokens)
    found = [text.index(end) for end in stop if end in text]
    return text[: min(found)] if found else text


def _decoded(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[int]) -> str:
    text = tokenizer.decode(
        list(tokens), skip_special_tokens=True, clean_up_tokenization_spaces=False
    )
    return str(text)
