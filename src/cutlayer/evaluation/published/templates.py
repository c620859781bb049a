"""How a question of a published task is put to a model: plain text, or turns of a conversation.

It knows no tokens and writes no file. The words are ours, kept short for small models: no published
table was made with them, so numbers compare within one form and one template alone.
"""

import tomllib
from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path
from types import MappingProxyType
from typing import Protocol

import msgspec

from cutlayer.data.settings import placeholders
from cutlayer.errors import ConfigError, DataError
from cutlayer.evaluation.published.question import Question
from cutlayer.storage.files import explain_os_errors

__all__ = [
    "TEMPLATES",
    "ChatTokenizer",
    "Form",
    "Template",
    "form_of",
    "read_template",
    "template_of",
]


class Form(StrEnum):
    """How the model is spoken to."""

    PLAIN = "plain"
    """A text that the answer continues: base models, and any other."""
    CHAT = "chat"
    """One user turn that the assistant answers, through the tokenizer's chat template."""


class ChatTokenizer(Protocol):
    """What tells a chat model from a base model."""

    chat_template: str | None


class Template(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Words around a question's texts; `{name}` is the text of that name."""

    prompt: str
    """Plain form, up to the answer and without the space before it."""
    chat: str | None = None
    """User turn; None takes `prompt`. There is no system turn: some families refuse one."""
    choices: Mapping[str, str] = msgspec.field(default_factory=dict)
    """How a choice is written; one that is not listed stands as it is."""
    stop: tuple[str, ...] = ("\n",)
    """Plain form: texts that end a reply. A chat model ends its turn itself."""

    def asked(self, question: Question, form: Form) -> str:
        """The text before the answer, or the user's turn.

        Raises:
            DataError: the question lacks a text that the template names.
        """
        words = self.prompt if form is Form.PLAIN or self.chat is None else self.chat
        return "".join(literal + _text(question, name) for literal, name in placeholders(words))

    def written(self, answer: str, form: Form) -> str:
        """An answer or choice as the model has to write it: with its space in plain form."""
        spelt = self.choices.get(answer, answer).strip()
        return f" {spelt}" if form is Form.PLAIN else spelt

    def stops(self, form: Form) -> tuple[str, ...]:
        """Texts that end a reply."""
        return self.stop if form is Form.PLAIN else ()


_RTE = {"entailment": "True", "not_entailment": "False"}
_CB = {"entailment": "True", "contradiction": "False", "neutral": "Neither"}

TEMPLATES: Mapping[str, Template] = MappingProxyType(
    {
        "boolq": Template(
            prompt="{passage}\nQuestion: {question}?\nAnswer (yes or no):",
            chat="{passage}\n\nQuestion: {question}? Answer with yes or no.",
        ),
        "cb": Template(
            prompt="{premise}\nQuestion: {hypothesis} True, False or Neither?\nAnswer:",
            choices=_CB,
        ),
        "cnn_dailymail": Template(
            prompt="Article: {document}\n\nSummary:",
            chat="Summarise the article in a few sentences.\n\n{document}",
            stop=("\n\n",),
        ),
        "copa": Template(
            prompt="{premise}\nWhat was the {question}?\nAnswer:",
            chat="{premise} What was the {question}?",
        ),
        "coqa": Template(
            prompt="{story}\n{history}\nQ: {question}\nA:",
            chat="{story}\n{history}\nQ: {question}\nAnswer the last question in a few words.",
        ),
        "multirc": Template(
            prompt="{paragraph}\n\nQuestion: {question}\nProposed answer: {answer}\n"
            "Is the proposed answer correct (yes or no)?",
        ),
        "record": Template(
            prompt="{passage}\n\n{query}\n@placeholder is",
            chat="{passage}\n\n{query}\n\nWhat does @placeholder stand for?",
        ),
        "rte": Template(
            prompt="{premise}\nQuestion: {hypothesis} True or False?\nAnswer:",
            choices=_RTE,
        ),
        "sentiment": Template(
            prompt="Review: {text}\nSentiment (positive or negative):",
            chat="Is the review positive or negative? Answer with one word.\n\n{text}",
        ),
        "topics": Template(
            # As in the demo.
            prompt="News: {text}\nTopic (business, entertainment, politics, sports or tech):",
            chat="News: {text}\nWhat is its topic: business, entertainment, politics, sports "
            "or tech? Answer with one word.",
        ),
        "wic": Template(
            prompt="Sentence 1: {sentence1}\nSentence 2: {sentence2}\n"
            "Has {word} the same meaning in both sentences (yes or no)?",
        ),
        "wsc": Template(
            prompt="{marked_text}\nDoes *{span2_text}* stand for {span1_text} (yes or no)?",
        ),
        "xsum": Template(
            prompt="Article: {document}\n\nSummary in one sentence:",
            chat="Summarise the article in one sentence.\n\n{document}",
        ),
    }
)
"""By name of the task. One set serves all families: they differ in their chat templates, which the
tokenizer brings along."""


def template_of(task: str) -> Template:
    """The template of a task.

    Raises:
        ConfigError: no such task.
    """
    if task not in TEMPLATES:
        raise ConfigError(f"no template for task {task!r}; known: {', '.join(sorted(TEMPLATES))}")
    return TEMPLATES[task]


def form_of(tokenizer: ChatTokenizer) -> Form:
    """Chat where the tokenizer has a chat template, else plain.

    Families whose template makes room for thinking before the answer (`<think>`) are spoken to in
    plain form: a choice right after the prompt would be scored where thoughts are expected.
    """
    template = tokenizer.chat_template
    return Form.CHAT if template and "<think>" not in template else Form.PLAIN


def read_template(file: Path, task: str) -> Template:
    """A template of one's own: TOML with `prompt`, and maybe `chat`, `stop` and `[choices]`.

    Args:
        file: without `stop` replies end as in the task's own template.
        task: the published task that it is for.

    Raises:
        ConfigError: no such task, not TOML, an unknown key, braces that name no text, a prompt that
            ends with the space that an answer brings, an empty text where one must stand.
        StorageError: it cannot be read.
    """
    own = template_of(task)
    with explain_os_errors(f"read {file}"):
        raw = file.read_bytes()
    try:
        template = msgspec.convert({"stop": own.stop, **tomllib.loads(raw.decode())}, Template)
        _check_template(template)
    except (tomllib.TOMLDecodeError, msgspec.ValidationError, ValueError) as error:
        raise ConfigError(f"{file} is no template: {error}; see docs/published-tasks.md") from error
    return template


def _check_template(template: Template) -> None:
    for words in (template.prompt, template.chat):
        if words is not None and not placeholders(words):
            raise ValueError("it names no text of the question; write one as {name}")
    if template.prompt.endswith(" "):
        raise ValueError("the prompt ends with a space, which the answer brings; remove it")
    if not all((*template.stop, *map(str.strip, template.choices.values()))):
        raise ValueError("a stop text or a choice is empty; write at least one character")


def _text(question: Question, name: str | None) -> str:
    if name is None:
        return ""
    if name not in question.fields:
        known = ", ".join(sorted(question.fields))
        raise DataError(
            f"question {question.key} has no text {name!r} for the template; it has {known}"
        )
    return question.fields[name]
