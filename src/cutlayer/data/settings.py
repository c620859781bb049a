"""What the owner says about the data: which files, which fields, which form a row takes.

It does not read anything.
"""

from enum import StrEnum
from pathlib import Path
from string import Formatter
from typing import Self

from pydantic import Field, field_validator, model_validator

from cutlayer.settings import Settings

__all__ = ["AssistantTurns", "DataSettings", "OnTooLong", "placeholders"]


class OnTooLong(StrEnum):
    """What happens to a row with more tokens than allowed."""

    ERROR = "error"
    TRUNCATE_PROMPT = "truncate-prompt"
    SKIP = "skip"


class AssistantTurns(StrEnum):
    """Which turns of a conversation are learnt."""

    LAST = "last"
    ALL = "all"


class DataSettings(Settings):
    """Which files hold the rows and how a record becomes prompt and completion."""

    train: Path
    """File (JSONL, CSV, TSV, Parquet) or folder (saved by `datasets`, or with data files)."""
    validation: Path | None = None
    """File or folder with validation rows; in a folder, its split `validation`."""
    validation_fraction: float = Field(default=0.0, ge=0.0, lt=1.0)
    """Share of the training records kept for validation, chosen by `split_seed`."""
    split_seed: int = Field(default=0, ge=0)
    """Seed of that choice."""
    kind: str | None = None
    """Kind of source (jsonl, csv, tsv, parquet, datasets); none means by suffix."""
    prompt: str | None = None
    """Column with the prompt; not scored."""
    prompt_template: str | None = None
    """Prompt made of columns, such as `News: {text}\\nTopic:`; doubled braces are braces."""
    completion: str | None = None
    """Column with the completion; the only scored tokens."""
    completion_template: str | None = None
    """Completion made of columns, such as ` {topic}`."""
    messages: str | None = None
    """Column with a conversation: a list of objects with `role` and `content`."""
    assistant_turns: AssistantTurns = AssistantTurns.LAST
    """Learn the last assistant turn of a conversation, or every one."""
    chat_template: bool = True
    """Render through the model's chat template; false joins prompt and completion as they are."""
    append_eos: bool = True
    """Plain form only: end the completion with the end-of-text token, and score it."""
    max_length: int | None = Field(default=None, ge=2)
    """Tokens of a row at most; none means the model's context."""
    on_too_long: OnTooLong = OnTooLong.ERROR
    """What to do with longer rows: error, truncate-prompt (from its start), skip."""

    @field_validator("prompt_template", "completion_template")
    @classmethod
    def _check_template(cls, template: str | None) -> str | None:
        if template is not None and not placeholders(template):
            raise ValueError("the template names no column; write one as {column}")
        return template

    @model_validator(mode="after")
    def _check_choice(self) -> Self:
        if self.validation is not None and self.validation_fraction > 0:
            raise ValueError("set validation or validation_fraction, not both")
        for name in ("prompt", "completion"):
            if getattr(self, name) is not None and getattr(self, f"{name}_template") is not None:
                raise ValueError(f"set {name} or {name}_template, not both")
        has_completion = self.completion is not None or self.completion_template is not None
        has_prompt = self.prompt is not None or self.prompt_template is not None
        if self.messages is not None:
            self._check_messages(has_prompt or has_completion)
        elif not has_completion:
            raise ValueError("say what to learn: set messages, completion or completion_template")
        elif self.chat_template and not has_prompt:
            raise ValueError("the chat template needs prompt or prompt_template; or set false")
        return self

    def _check_messages(self, has_columns: bool) -> None:
        if has_columns:
            raise ValueError("set messages, or prompt and completion, not both")
        if not self.chat_template:
            raise ValueError("messages need chat_template = true")


def placeholders(template: str) -> list[tuple[str, str | None]]:
    """Split a template into (literal text, column after it or None).

    Returns an empty list where no column is named. Only bare names are allowed: no format, no
    conversion, no attribute.

    Raises:
        ValueError: unbalanced braces, or more than a bare name inside them.
    """
    parts: list[tuple[str, str | None]] = []
    for literal, name, form, conversion in Formatter().parse(template):
        if name == "" or form or conversion:
            raise ValueError(f"write a bare column name in braces, not {{{name}}} with a format")
        parts.append((literal, name))
    return parts if any(name is not None for _, name in parts) else []
