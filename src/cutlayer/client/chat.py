"""Tokens to text at the owner: streaming pieces, and a chat that continues a session.

It does not choose tokens (`sampling`), decode them (`row_text`) nor feed the model (`generate`).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from cutlayer.client.generate import GenerationSession, generate_tokens
from cutlayer.client.row_text import RowText
from cutlayer.client.settings import SamplingSettings
from cutlayer.errors import ConfigError

__all__ = ["Chat", "TextPiece", "eos_ids", "require_chat_template", "text_pieces"]


@dataclass(frozen=True, kw_only=True)
class TextPiece:
    """New text of one row."""

    row: int
    text: str


def text_pieces(
    session: GenerationSession,
    prompts: Sequence[Sequence[int]],
    sampling: SamplingSettings,
    tokenizer: PreTrainedTokenizerBase,
) -> Iterator[TextPiece]:
    """Text of all rows as it becomes certain; stop texts are not part of it."""
    texts = [RowText(tokenizer, sampling.stop) for _ in prompts]
    tokens = generate_tokens(
        session, prompts, sampling, eos_ids(tokenizer), lambda row: texts[row].is_stopped
    )
    for new in tokens:
        piece = texts[new.row].add(new.token)
        if piece:
            yield TextPiece(row=new.row, text=piece)
    for row, text in enumerate(texts):
        piece = text.rest()
        if piece:
            yield TextPiece(row=row, text=piece)


class Chat:
    """One conversation over one session: each turn sends its new tokens alone."""

    def __init__(
        self,
        session: GenerationSession,
        tokenizer: PreTrainedTokenizerBase,
        sampling: SamplingSettings,
        max_length: int,
    ) -> None:
        require_chat_template(tokenizer)
        self._session = session
        self._tokenizer = tokenizer
        self._sampling = sampling
        self._max_length = max_length
        self._messages: list[dict[str, str]] = []
        self._fed: list[int] = []

    def ask(self, text: str) -> Iterator[str]:
        """Pieces of the reply to one more message.

        Raises:
            ConfigError: the conversation is longer than the session or the model's context.
        """
        messages = [*self._messages, {"role": "user", "content": text}]
        tokens = self._render(messages)
        if len(tokens) + self._sampling.max_new_tokens > self._max_length:
            raise ConfigError(
                f"the conversation has {len(tokens)} tokens and the session room for "
                f"{self._max_length}; start a new chat or lower sampling.max_new_tokens"
            )
        known = self._keep_common(tokens)
        reply = ""
        rows = RowText(self._tokenizer, self._sampling.stop)
        new_tokens = generate_tokens(
            self._session,
            [tokens[known:]],
            self._sampling,
            eos_ids(self._tokenizer),
            lambda row: rows.is_stopped,
            seen=[tokens[:known]],
        )
        self._fed = list(tokens)
        for new in new_tokens:
            self._fed.append(new.token)
            piece = rows.add(new.token)
            reply += piece
            yield piece
        reply += (rest := rows.rest())
        yield rest
        self._messages = [*messages, {"role": "assistant", "content": reply}]

    def close(self) -> None:
        """Give the server's cache back."""
        self._session.close()

    def _render(self, messages: list[dict[str, str]]) -> list[int]:
        text = self._tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True
        )
        return list(self._tokenizer(str(text), add_special_tokens=False)["input_ids"])

    def _keep_common(self, tokens: Sequence[int]) -> int:
        """How many tokens the session has already; at least the last one must be fed again."""
        limit = min(self._session.length(0), len(tokens) - 1)
        known = 0
        while known < limit and self._fed[known] == tokens[known]:
            known += 1
        self._session.truncate(0, known)
        return known


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
