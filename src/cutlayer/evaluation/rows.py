"""Items of a task file as token ids: prompts, and what may follow them.

It does not run a model. What is too long for the model is found here, before any work.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import jinja2

from cutlayer.errors import DataError
from cutlayer.evaluation.tasks import ChoiceItem, GenerateItem, Item, Prompt

__all__ = ["ChoiceRow", "GenerateRow", "ItemTokenizer", "RowMaker", "TooLong"]


class ItemTokenizer(Protocol):
    """What evaluation needs of a transformers tokenizer."""

    chat_template: str | None

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


@dataclass(frozen=True, kw_only=True)
class ChoiceRow:
    """One choice item in tokens."""

    item: ChoiceItem
    context: tuple[int, ...] = field(repr=False)
    """Token ids before the choices, at least one."""
    choices: tuple[tuple[int, ...], ...] = field(repr=False)
    """Token ids of each choice, at least one."""

    @property
    def num_tokens(self) -> int:
        """Tokens of its longest row: the last token of a choice is scored, not fed."""
        return len(self.context) + max(len(choice) for choice in self.choices) - 1


@dataclass(frozen=True, kw_only=True)
class GenerateRow:
    """One generate item in tokens."""

    item: GenerateItem
    prompt: tuple[int, ...] = field(repr=False)
    """Token ids, at least one."""

    @property
    def num_tokens(self) -> int:
        """Tokens of prompt and longest reply."""
        return len(self.prompt) + self.item.max_new_tokens


@dataclass(frozen=True, kw_only=True)
class TooLong:
    """An item that the model cannot take."""

    where: str
    """`file:line`."""
    num_tokens: int
    """What it needs."""
    context_length: int
    """What the model takes."""

    def __str__(self) -> str:
        return f"{self.where}: {self.num_tokens} tokens in a context of {self.context_length}"


class RowMaker:
    """Tokenizes items with one tokenizer, for a model of one context length."""

    def __init__(self, tokenizer: ItemTokenizer, context_length: int) -> None:
        self._tokenizer = tokenizer
        self._context_length = context_length

    def make(self, item: Item) -> ChoiceRow | GenerateRow | TooLong:
        """The item's tokens, or what it lacks room for.

        Raises:
            DataError: a prompt or choice gives no token, or the chat template refuses the turns.
        """
        row = self._choice(item) if isinstance(item, ChoiceItem) else self._generate(item)
        if row.num_tokens > self._context_length:
            return TooLong(
                where=item.where,
                num_tokens=row.num_tokens,
                context_length=self._context_length,
            )
        return row

    def _choice(self, item: ChoiceItem) -> ChoiceRow:
        context = self._prompt(item.prompt, item.where)
        text = self._text(item.prompt, item.where)
        bare = self._bare(text)
        choices = [self._continuation(text, bare, choice) for choice in item.choices]
        if not all(choices):
            place = [bool(choice) for choice in choices].index(False) + 1
            raise DataError(f"{item.where}: choice {place} gives no token; remove or change it")
        return ChoiceRow(item=item, context=tuple(context), choices=tuple(choices))

    def _generate(self, item: GenerateItem) -> GenerateRow:
        return GenerateRow(item=item, prompt=tuple(self._prompt(item.prompt, item.where)))

    def _prompt(self, prompt: Prompt, where: str) -> list[int]:
        # A chat template writes its own special tokens.
        tokens = self._tokenizer.encode(
            self._text(prompt, where), add_special_tokens=prompt.text is not None
        )
        if not tokens:
            raise DataError(f"{where}: the prompt gives no token; write at least one character")
        return tokens

    def _text(self, prompt: Prompt, where: str) -> str:
        if prompt.text is not None:
            return prompt.text
        if not self._tokenizer.chat_template:
            raise DataError(f"{where}: the model has no chat template; give a text, not messages")
        try:
            return self._tokenizer.apply_chat_template(
                list(prompt.messages), tokenize=False, add_generation_prompt=True
            )
        except (jinja2.TemplateError, ValueError, TypeError) as error:
            raise DataError(
                f"{where}: the chat template refuses the conversation: {error}; mend its turns"
            ) from error

    def _continuation(self, text: str, bare: Sequence[int], choice: str) -> tuple[int, ...]:
        """Tokens of a choice after its context, which keeps the tokens that it has alone."""
        whole = self._bare(text + choice)
        if whole[: len(bare)] == bare:
            return tuple(whole[len(bare) :])
        # A token would reach over the border.
        return tuple(self._bare(choice))

    def _bare(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False)
