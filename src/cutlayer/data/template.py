"""Records as rows of tokens with labels on the completion only.

It does not read files nor make batches. Labels are aligned with the tokens, not shifted: position
t predicts the label at t + 1, and -100 means not scored.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol

import jinja2

from cutlayer.data.private_text import Ranges, are_private, filled, found_in
from cutlayer.data.settings import AssistantTurns, DataSettings, OnTooLong, placeholders
from cutlayer.data.sources import Record
from cutlayer.errors import ConfigError, DataError

__all__ = ["NOT_SCORED", "Example", "RowLimits", "RowMaker", "Span", "Tokenizer"]

NOT_SCORED = -100
"""Label of a token that the loss leaves out."""


class Tokenizer(Protocol):
    """What this room needs of a transformers tokenizer."""

    chat_template: str | None
    eos_token_id: int | None

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """Token ids of a text."""
        ...

    def apply_chat_template(
        self,
        conversation: list[dict[str, str]],
        *,
        tokenize: bool,
        add_generation_prompt: bool,
    ) -> str:
        """A conversation as the text that the model was trained on."""
        ...


@dataclass(frozen=True)
class Example:
    """One row for training or validation; it never leaves the owner."""

    tokens: list[int] = field(repr=False)
    """Token ids."""
    labels: list[int] = field(repr=False)
    """Token id where scored, else -100; as long as `tokens`, and the first is never scored."""
    row_id: int
    """Number of the record, unique over training and validation: noise is keyed by it."""
    is_private: list[bool] = field(default_factory=list, repr=False)
    """Per token whether it is text of the record, not the template's own; empty: all are."""
    is_withheld: list[bool] = field(default_factory=list, repr=False)
    """Per token whether its vector stays where a gate withholds; empty: the private ones."""


@dataclass(frozen=True)
class RowLimits:
    """What the model can take."""

    context_length: int
    """Tokens of a row at most."""
    vocab_size: int | None = None
    """Token ids are below this; None leaves it unchecked."""


@dataclass(frozen=True)
class Span:
    """A run of text that is scored or not."""

    text: str = field(repr=False)
    is_scored: bool
    private: Ranges = ()
    """Characters that come from the record."""


class RowMaker:
    """Makes an Example of each record, by the settings and with one tokenizer."""

    def __init__(self, settings: DataSettings, tokenizer: Tokenizer, limits: RowLimits) -> None:
        self._settings = settings
        self._tokenizer = tokenizer
        self._limits = limits
        self.max_length = _max_length(settings, limits)
        """Tokens of a row at most."""
        if settings.chat_template and not tokenizer.chat_template:
            raise ConfigError(
                "the model's tokenizer has no chat template; set data.chat_template = false"
            )
        needs_eos = settings.append_eos and not settings.chat_template
        if needs_eos and tokenizer.eos_token_id is None:
            raise ConfigError("the tokenizer has no end token; set data.append_eos = false")
        self._start = [] if settings.chat_template else _start_tokens(tokenizer)

    def make(self, record: Record, row_id: int) -> Example | None:
        """The record's row, or None where the settings say to skip a row that is too long.

        Raises:
            DataError: a column is missing or not text, the completion is empty, the row too long.
        """
        spans = self._chat_spans(record) if self._settings.chat_template else self._plain(record)
        tokens, labels, private = self._tokenize(spans)
        num_prompt = self._num_prompt(labels, record)
        excess = len(tokens) - self.max_length
        if excess > 0:
            if self._settings.on_too_long is OnTooLong.SKIP:
                return None
            self._check_excess(len(tokens), num_prompt, record)
            keep = len(self._start)
            tokens = tokens[:keep] + tokens[keep + excess :]
            labels = labels[:keep] + labels[keep + excess :]
            private = private[:keep] + private[keep + excess :]
        self._check_vocab(tokens, record)
        return Example(tokens, labels, row_id, private)

    def _plain(self, record: Record) -> list[Span]:
        settings = self._settings
        prompt, completion = self._prompt(record), self._completion(record)
        _, of_prompt = filled(_parts(record, settings.prompt, settings.prompt_template))
        _, of_completion = filled(_parts(record, settings.completion, settings.completion_template))
        return [
            Span(prompt, is_scored=False, private=of_prompt),
            Span(completion, is_scored=True, private=of_completion),
        ]

    def _prompt(self, record: Record) -> str:
        column, template = self._settings.prompt, self._settings.prompt_template
        if column is None and template is None:
            return ""
        prompt, _ = filled(_parts(record, column, template))
        if not prompt.strip():
            raise DataError(f"{record.where}: the prompt is empty; remove the row or fill it")
        return prompt

    def _completion(self, record: Record) -> str:
        settings = self._settings
        parts = _parts(record, settings.completion, settings.completion_template)
        completion, _ = filled(parts)
        if not completion.strip():
            raise DataError(f"{record.where}: the completion is empty; remove the row or fill it")
        return completion

    def _chat_spans(self, record: Record) -> list[Span]:
        messages = self._messages(record)
        last = len(messages) - 1
        learn_all = self._settings.assistant_turns is AssistantTurns.ALL
        turns = [
            turn
            for turn, message in enumerate(messages)
            if message["role"] == "assistant" and (learn_all or turn == last)
        ]
        whole = self._render(messages, record, add_generation_prompt=False)
        spans: list[Span] = []
        pieces = self._private_pieces(record, messages)
        done, num_done = "", 0
        for turn in turns:
            before = self._render(messages[:turn], record, add_generation_prompt=True)
            after = self._render(messages[: turn + 1], record, add_generation_prompt=False)
            _check_prefixes(record, done, before, after, whole)
            asked, said = before[len(done) :], after[len(before) :]
            said_by_others = [text for texts in pieces[num_done:turn] for text in texts]
            own = found_in(said, pieces[turn])
            spans.append(Span(asked, is_scored=False, private=found_in(asked, said_by_others)))
            spans.append(Span(said, is_scored=True, private=own))
            done, num_done = after, turn + 1
        return spans

    def _messages(self, record: Record) -> list[dict[str, str]]:
        if self._settings.messages is not None:
            return _conversation(record, self._settings.messages)
        return [
            {"role": "user", "content": self._prompt(record)},
            {"role": "assistant", "content": self._completion(record)},
        ]

    def _private_pieces(
        self, record: Record, messages: Sequence[Mapping[str, str]]
    ) -> list[list[str]]:
        """Per message the texts of the record in it; templates trim what a message says."""
        settings = self._settings
        if settings.messages is not None:
            return [[message["content"].strip()] for message in messages]
        prompt = _parts(record, settings.prompt, settings.prompt_template)
        completion = _parts(record, settings.completion, settings.completion_template)
        return [[text.strip() for _, text in parts] for parts in (prompt, completion)]

    def _render(
        self, messages: list[dict[str, str]], record: Record, *, add_generation_prompt: bool
    ) -> str:
        try:
            return self._tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=add_generation_prompt
            )
        except (jinja2.TemplateError, ValueError, TypeError) as error:
            raise DataError(
                f"{record.where}: the chat template refuses the conversation: {error}; "
                "mend the turns' order, or set data.chat_template = false"
            ) from error

    def _tokenize(self, spans: Sequence[Span]) -> tuple[list[int], list[int], list[bool]]:
        tokens, labels = list(self._start), [NOT_SCORED] * len(self._start)
        private = [False] * len(self._start)
        encode = partial(_encode, self._tokenizer)
        for span, ids in zip(spans, _encode_spans(self._tokenizer, spans), strict=True):
            tokens += ids
            labels += self._span_labels(span, ids)
            private += are_private(ids, span.text, span.private, encode)
        if self._settings.chat_template:
            end = max((i for i, label in enumerate(labels) if label != NOT_SCORED), default=-1)
            tokens, labels, private = tokens[: end + 1], labels[: end + 1], private[: end + 1]
        elif self._settings.append_eos:
            assert self._tokenizer.eos_token_id is not None
            tokens.append(self._tokenizer.eos_token_id)
            labels.append(self._tokenizer.eos_token_id)
            private.append(False)
        if labels:
            labels[0] = NOT_SCORED
        return tokens, labels, private

    def _span_labels(self, span: Span, ids: list[int]) -> list[int]:
        if not span.is_scored:
            return [NOT_SCORED] * len(ids)
        eos = self._tokenizer.eos_token_id
        if not self._settings.chat_template or eos not in ids:
            return list(ids)
        # What a template writes after the end of the turn is never generated: not scored.
        num_scored = len(ids) - ids[::-1].index(eos)
        return ids[:num_scored] + [NOT_SCORED] * (len(ids) - num_scored)

    def _num_prompt(self, labels: list[int], record: Record) -> int:
        """Tokens before the first scored one."""
        for place, label in enumerate(labels):
            if label != NOT_SCORED:
                return place
        raise DataError(f"{record.where}: no token to learn; the completion gives no scored token")

    def _check_excess(self, num_tokens: int, num_prompt: int, record: Record) -> None:
        found = f"{record.where}: {num_tokens} tokens, {num_prompt} of them before the completion"
        if self._settings.on_too_long is OnTooLong.ERROR:
            raise DataError(
                f"{found}; at most {self.max_length} are allowed (data.max_length, model context "
                f"{self._limits.context_length}): shorten the row, or set data.on_too_long to "
                "truncate-prompt or skip"
            )
        # One prompt token stays: the first completion token is predicted from it.
        if num_prompt - max(len(self._start), 1) < num_tokens - self.max_length:
            raise DataError(
                f"{found}; the completion alone does not fit in {self.max_length} tokens: "
                "shorten it, or set data.on_too_long = skip"
            )

    def _check_vocab(self, tokens: list[int], record: Record) -> None:
        vocab_size = self._limits.vocab_size
        if vocab_size is not None and max(tokens) >= vocab_size:
            raise DataError(
                f"{record.where}: token id {max(tokens)} for a model with {vocab_size}; "
                "the tokenizer belongs to another model"
            )


def _max_length(settings: DataSettings, limits: RowLimits) -> int:
    wanted = settings.max_length
    if wanted is not None and wanted > limits.context_length:
        raise ConfigError(
            f"data.max_length={wanted} exceeds the model's context of {limits.context_length} "
            f"tokens; choose at most {limits.context_length}"
        )
    return limits.context_length if wanted is None else wanted


def _start_tokens(tokenizer: Tokenizer) -> list[int]:
    """The special tokens that the tokenizer puts before a text, such as <bos>."""
    bare = tokenizer.encode("a", add_special_tokens=False)
    full = tokenizer.encode("a", add_special_tokens=True)
    for start in range(len(full)):
        if full[start : start + len(bare)] == bare:
            return full[:start]
    return []


def _parts(record: Record, column: str | None, template: str | None) -> list[tuple[str, str]]:
    """Fixed words, and the record's text behind each; "" where there is none."""
    parts = [("", column)] if template is None else placeholders(template)
    return [(words, record.text(name) if name else "") for words, name in parts]


def _encode_spans(tokenizer: Tokenizer, spans: Iterable[Span]) -> Iterator[list[int]]:
    """Token ids of each span, so that every prompt has the tokens it has at generation.

    The text so far is encoded as a whole; where a token would cross the border of two spans, the
    later one is encoded alone.
    """
    text, done = "", list[int]()
    for span in spans:
        text += span.text
        whole = tokenizer.encode(text, add_special_tokens=False)
        is_prefix = whole[: len(done)] == done
        alone = whole[len(done) :] if is_prefix else _encode(tokenizer, span.text)
        done = done + alone
        yield alone


def _encode(tokenizer: Tokenizer, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False)


def _check_prefixes(record: Record, done: str, before: str, after: str, whole: str) -> None:
    if before.startswith(done) and after.startswith(before) and whole.startswith(after):
        return
    raise DataError(
        f"{record.where}: the chat template changes earlier turns when later ones are added, so "
        "the completion cannot be told from the prompt; set data.assistant_turns = last, or "
        "data.chat_template = false with prompt and completion columns"
    )


def _conversation(record: Record, column: str) -> list[dict[str, str]]:
    value = record.value(column)
    if not isinstance(value, list) or not value:
        raise DataError(f"{record.where}: column {column!r} is no list of messages")
    messages = [_message(record, item, turn) for turn, item in enumerate(value, start=1)]
    last = messages[-1]
    if last["role"] != "assistant" or not last["content"].strip():
        raise DataError(
            f"{record.where}: the last message must be the assistant's and not empty; "
            "it is what is learnt"
        )
    return messages


def _message(record: Record, item: object, turn: int) -> dict[str, str]:
    where = f"{record.where}: message {turn}"
    if not isinstance(item, Mapping):
        raise DataError(f"{where} is no object with role and content")
    role, content = item.get("role"), item.get("content")
    if not isinstance(role, str) or not isinstance(content, str):
        raise DataError(f"{where} needs role and content, both text")
    record.check_unicode(content, f"message {turn}")
    return {"role": role, "content": content}
