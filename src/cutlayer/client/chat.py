"""A chat at the owner: each turn sends its new tokens alone, as earlier turns stay cached.

It does not generate (`decoder`) nor turn tokens into text (`row_text`).
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from cutlayer.client.decoder import Decoder
from cutlayer.client.row_text import RowText
from cutlayer.client.settings import SamplingSettings
from cutlayer.client.streams import NewToken, Request
from cutlayer.errors import ConfigError

__all__ = ["Chat", "TextPiece", "eos_ids", "require_chat_template"]


@dataclass(frozen=True, kw_only=True)
class TextPiece:
    """New text of one row."""

    row: int
    text: str


class Chat:
    """One conversation over a decoder of its own."""

    def __init__(
        self,
        decoder: Decoder,
        tokenizer: PreTrainedTokenizerBase,
        sampling: SamplingSettings,
        max_length: int,
    ) -> None:
        """
        Args:
            decoder: closed with the chat.
            tokenizer: the model's, with a chat template.
            sampling: how to choose tokens.
            max_length: tokens of the conversation at most.
        """
        self._decoder = decoder
        self._tokenizer = tokenizer
        self._sampling = sampling
        self._max_length = max_length
        self._messages: list[dict[str, str]] = []

    def ask(self, text: str) -> Iterator[str]:
        """Pieces of the reply to one more message.

        Raises:
            ConfigError: the conversation is longer than `max_length`.
        """
        messages = [*self._messages, {"role": "user", "content": text}]
        prompt = self._render(messages)
        reply = RowText(self._tokenizer, self._sampling.stop)
        pieces: list[str] = []
        shown = ""

        def watch(new: NewToken) -> bool:
            pieces.append(reply.add(new.token))
            return reply.is_stopped

        ends = eos_ids(self._tokenizer)
        stream = self._decoder.add(
            Request(prompt=prompt, sampling=self._sampling, eos_ids=ends, watch=watch)
        )
        is_under_way = True
        try:
            while is_under_way:
                pause_s = self._decoder.step()
                if pause_s:
                    time.sleep(pause_s)
                is_under_way = not stream.has_ended
                if not is_under_way:
                    pieces.append(reply.rest())
                while pieces:
                    piece = pieces.pop(0)
                    shown += piece
                    yield piece
        finally:
            # Nobody reads on: nothing more of it may leave beside the next question.
            self._decoder.cancel(stream)
        if stream.error is not None:
            raise stream.error
        self._messages = [*messages, {"role": "assistant", "content": shown}]

    def close(self) -> None:
        """Give the server's cache back."""
        self._decoder.close()

    def _render(self, messages: list[dict[str, str]]) -> list[int]:
        text = self._tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True
        )
        tokens = list(self._tokenizer(str(text), add_special_tokens=False)["input_ids"])
        if len(tokens) + self._sampling.max_new_tokens > self._max_length:
            raise ConfigError(
                f"the conversation has {len(tokens)} tokens and the session room for "
                f"{self._max_length}; start a new chat or lower sampling.max_new_tokens"
            )
        return tokens


def require_chat_template(tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises ConfigError where the model knows no form of a conversation."""
    if tokenizer.chat_template is None:
        raise ConfigError("the model has no chat template; use `cutlayer generate` instead")


def eos_ids(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Tokens that end a reply: end of text, and the chat form's end of turn where it has one."""
    names = ("<|im_end|>", "<|eot_id|>", "<end_of_turn>", "<|end|>", "<|endoftext|>")
    vocabulary = tokenizer.get_vocab()
    known = {vocabulary[name] for name in names if name in vocabulary}
    if tokenizer.eos_token_id is not None:
        known.add(int(tokenizer.eos_token_id))
    return frozenset(known)
