"""Items as tokens: what generation would feed, and what a choice adds to it."""

from pathlib import Path

import pytest
from tokenizers import processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from cutlayer.errors import DataError
from cutlayer.evaluation.rows import ChoiceRow, GenerateRow, RowMaker, TooLong
from cutlayer.evaluation.tasks import ChoiceItem, GenerateItem, Prompt
from tests.tiny_models import save_tokenizer

TURNS = ({"role": "user", "content": "Cow?"},)


@pytest.fixture
def tokenizer(tmp_path: Path) -> PreTrainedTokenizerFast:
    save_tokenizer(tmp_path)
    return AutoTokenizer.from_pretrained(tmp_path)


def choice(prompt: Prompt, *choices: str) -> ChoiceItem:
    return ChoiceItem(where="f:3", prompt=prompt, choices=choices, answer=0)


def generate(prompt: Prompt, max_new_tokens: int = 5) -> GenerateItem:
    return GenerateItem(
        where="f:4",
        prompt=prompt,
        answers=("moo",),
        metrics=("f1",),
        max_new_tokens=max_new_tokens,
        stop=(),
    )


def test_a_choice_is_what_follows_its_context(tokenizer: PreTrainedTokenizerFast) -> None:
    row = RowMaker(tokenizer, 100).make(choice(Prompt(text="Cow"), " moo", "!"))
    assert isinstance(row, ChoiceRow)
    assert list(row.context) == tokenizer("Cow")["input_ids"]
    assert [tokenizer.decode(tokens) for tokens in row.choices] == [" moo", "!"]
    assert row.num_tokens == len("Cow moo") - 1


def test_a_token_never_reaches_over_the_border_of_context_and_choice() -> None:
    class Pairs:
        """Two letters a token, from the left."""

        chat_template = None

        def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
            pairs = [text[i : i + 2] for i in range(0, len(text), 2)]
            return [ord(pair[0]) * 1000 + len(pair) for pair in pairs]

        def apply_chat_template(self, *given: object, **options: object) -> str:
            raise AssertionError

    row = RowMaker(Pairs(), 100).make(choice(Prompt(text="abc"), "de", "f"))
    assert isinstance(row, ChoiceRow)
    assert row.context == (97002, 99001)
    assert row.choices == ((100002,), (102001,))


def test_a_start_token_stands_before_a_text_and_not_before_a_rendered_chat(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    end = tokenizer.eos_token
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{end} $A", special_tokens=[(end, tokenizer.eos_token_id)]
    )
    maker = RowMaker(tokenizer, 100)
    row = maker.make(choice(Prompt(text="Cow"), " moo", "!"))
    assert isinstance(row, ChoiceRow)
    assert row.context[0] == tokenizer.eos_token_id
    assert [tokenizer.decode(tokens) for tokens in row.choices] == [" moo", "!"]
    chat = maker.make(generate(Prompt(messages=TURNS)))
    assert isinstance(chat, GenerateRow)
    assert tokenizer.decode(chat.prompt) == "<|user|>Cow?<|end|><|assistant|>"


def test_a_chat_choice_is_the_assistants_answer(tokenizer: PreTrainedTokenizerFast) -> None:
    row = RowMaker(tokenizer, 100).make(choice(Prompt(messages=TURNS), "moo", "meow"))
    assert isinstance(row, ChoiceRow)
    assert tokenizer.decode(row.context + row.choices[1]).endswith("<|assistant|>meow")


def test_messages_without_a_template_are_refused_by_line(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    tokenizer.chat_template = None
    with pytest.raises(DataError, match="f:4: the model has no chat template"):
        RowMaker(tokenizer, 100).make(generate(Prompt(messages=TURNS)))
    tokenizer.chat_template = "{{ raise_exception('no') }}"
    with pytest.raises(DataError, match="f:4: the chat template refuses"):
        RowMaker(tokenizer, 100).make(generate(Prompt(messages=TURNS)))


def test_an_item_may_fill_the_context_to_its_last_token(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    maker = RowMaker(tokenizer, 10)
    assert isinstance(maker.make(generate(Prompt(text="abcde"), 5)), GenerateRow)
    too_long = maker.make(generate(Prompt(text="abcde"), 6))
    assert isinstance(too_long, TooLong)
    assert str(too_long) == "f:4: 11 tokens in a context of 10"
    # The last token of a choice is scored, not fed.
    assert isinstance(maker.make(choice(Prompt(text="abcde"), "123456", "1")), ChoiceRow)
    assert isinstance(maker.make(choice(Prompt(text="abcde"), "1", "1234567")), TooLong)
