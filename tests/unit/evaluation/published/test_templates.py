"""Templates: each fits its task's texts, forms differ where they must, mistakes are named."""

from dataclasses import dataclass
from pathlib import Path

import pytest

from cutlayer.data.settings import placeholders
from cutlayer.data.topics import topic_settings
from cutlayer.errors import ConfigError, DataError, StorageError
from cutlayer.evaluation.published.catalogue import published_task
from cutlayer.evaluation.published.question import TASKS, Question
from cutlayer.evaluation.published.templates import (
    TEMPLATES,
    Form,
    Template,
    form_of,
    read_template,
    template_of,
)


@dataclass
class _Tokenizer:
    chat_template: str | None


class TestEveryTemplate:
    """What holds for all of them."""

    def test_each_published_task_has_one(self) -> None:
        assert published_task("coqa")
        assert set(TEMPLATES) == set(TASKS)

    @pytest.mark.parametrize("name", sorted(TEMPLATES))
    def test_both_forms_name_the_same_texts(self, name: str) -> None:
        template = template_of(name)
        plain = {part for _, part in placeholders(template.prompt)} - {None}
        chat = {part for _, part in placeholders(template.chat or template.prompt)} - {None}
        assert plain == chat
        assert template.prompt == template.prompt.rstrip(), "the choice brings the space"

    @pytest.mark.parametrize("name", sorted(TEMPLATES))
    def test_spellings_are_different_and_of_real_choices(self, name: str) -> None:
        template = template_of(name)
        labels = getattr(published_task(name), "labels", ())
        written = [template.written(label, Form.PLAIN) for label in labels]
        assert len(set(written)) == len(labels)
        assert all(text.startswith(" ") for text in written)
        assert set(template.choices) <= set(labels)


def test_topics_are_asked_as_in_the_demo() -> None:
    demo = topic_settings(Path("train"), Path("heldout"))
    assert template_of("topics").prompt == demo.prompt_template


def test_a_text_with_braces_is_taken_as_it_is() -> None:
    question = Question(key="k", fields={"text": "a {b} {{c}}"}, answers=("x",))
    template = Template(prompt="Say {text}:", chat="{text}{text}")
    assert template.asked(question, Form.PLAIN) == "Say a {b} {{c}}:"
    assert template.asked(question, Form.CHAT) == "a {b} {{c}}a {b} {{c}}"


def test_a_missing_text_names_those_there_are() -> None:
    question = Question(key="k", fields={"body": "x"}, answers=("x",))
    with pytest.raises(DataError, match=r"question k has no text 'text' .* it has body"):
        template_of("topics").asked(question, Form.PLAIN)
    with pytest.raises(ConfigError, match="known: boolq"):
        template_of("none")


def test_a_chat_model_ends_its_turn_itself() -> None:
    template = template_of("xsum")
    assert template.stops(Form.PLAIN) == ("\n",)
    assert template.stops(Form.CHAT) == ()


def test_the_form_follows_the_tokenizer() -> None:
    assert form_of(_Tokenizer(None)) is Form.PLAIN
    assert form_of(_Tokenizer("{{ messages }}")) is Form.CHAT
    assert form_of(_Tokenizer("{{ messages }}<think>")) is Form.PLAIN


def test_an_own_template_is_read_from_toml(tmp_path: Path) -> None:
    file = tmp_path / "words.toml"
    file.write_text('prompt = "{text} ="\nstop = [";"]\n[choices]\nyes = "true"\n')
    template = read_template(file, "boolq")
    assert template.stops(Form.PLAIN) == (";",)
    assert template.written("yes", Form.PLAIN) == " true"
    assert template.written("no", Form.CHAT) == "no"


def test_an_own_template_ends_replies_as_the_tasks_own_does(tmp_path: Path) -> None:
    file = tmp_path / "words.toml"
    file.write_text('prompt = "{document} TL;DR:"')
    # Highlights are one a line: a newline would end them after the first.
    assert read_template(file, "cnn_dailymail").stop == ("\n\n",)
    assert read_template(file, "xsum").stop == ("\n",)
    with pytest.raises(ConfigError, match="no template for task 'cnn'"):
        read_template(file, "cnn")


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("prompt = ", "is no template: Invalid value"),
        ('chat = "{text}"', "missing required field `prompt`"),
        ('prompt = "{text}"\nsystem = "x"', "unknown field `system`"),
        ('prompt = "no text"', "it names no text"),
        ('prompt = "{text}"\nchat = "{text!r}"', "bare column name"),
        ('prompt = "{text"', "is no template"),
        ("prompt = 3", "Expected `str`"),
        ('prompt = "{text}\\nAnswer: "', "ends with a space, which the answer brings"),
        ('prompt = "{text}"\nstop = [""]', "a stop text or a choice is empty"),
        ('prompt = "{text}"\n[choices]\nyes = " "', "a stop text or a choice is empty"),
    ],
)
def test_a_wrong_template_says_what_is_wrong(text: str, match: str, tmp_path: Path) -> None:
    file = tmp_path / "words.toml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=match):
        read_template(file, "boolq")
    with pytest.raises(StorageError, match="cannot read"):
        read_template(tmp_path / "none.toml", "boolq")
