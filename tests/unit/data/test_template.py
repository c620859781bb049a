"""Rows hold what generation would see, and labels stand on the completion alone."""

from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from cutlayer.data.settings import DataSettings
from cutlayer.data.sources import Record
from cutlayer.data.template import NOT_SCORED, Example, RowLimits, RowMaker
from cutlayer.errors import ConfigError, DataError
from cutlayer.settings import parse_settings

Tokenizer = PreTrainedTokenizerFast
LIMITS = RowLimits(context_length=256)
PLAIN = {"prompt": "p", "completion": "c", "chat_template": False}
TALK = [
    {"role": "user", "content": "the cat"},
    {"role": "assistant", "content": "sat"},
    {"role": "user", "content": "the dog"},
    {"role": "assistant", "content": "ran"},
]


def _make(
    table: dict[str, object],
    tokenizer: Tokenizer,
    fields: dict[str, object],
    limits: RowLimits = LIMITS,
) -> Example | None:
    settings = parse_settings(DataSettings, {"train": "t.jsonl", **table}, where="run.toml")
    return RowMaker(settings, tokenizer, limits).make(Record(fields, "t.jsonl:3"), row_id=2)


def _example(
    table: dict[str, object],
    tokenizer: Tokenizer,
    fields: dict[str, object],
    limits: RowLimits = LIMITS,
) -> Example:
    example = _make(table, tokenizer, fields, limits)
    assert example is not None
    assert len(example.tokens) == len(example.labels)
    assert all(label in (NOT_SCORED, token) for token, label in _pairs(example))
    assert example.labels[0] == NOT_SCORED
    return example


def _pairs(example: Example) -> list[tuple[int, int]]:
    return list(zip(example.tokens, example.labels, strict=True))


def _scored(example: Example, tokenizer: Tokenizer) -> str:
    """Scored text, with | between runs."""
    runs, is_in = [""], False
    for token, label in _pairs(example):
        if label != NOT_SCORED:
            runs += [""] if not is_in and runs[-1] else []
            runs[-1] += tokenizer.decode([token])
        is_in = label != NOT_SCORED
    return "|".join(runs)


def test_plain_rows_score_completion_and_end_token(tokenizer: Tokenizer) -> None:
    example = _example(PLAIN, tokenizer, {"p": "the cat", "c": " sat"})
    assert tokenizer.decode(example.tokens) == "the cat sat<|im_end|>"
    assert _scored(example, tokenizer) == " sat<|im_end|>"
    assert example.row_id == 2


def test_the_end_token_is_left_out_on_demand(tokenizer: Tokenizer) -> None:
    example = _example({**PLAIN, "append_eos": False}, tokenizer, {"p": "the cat", "c": " sat"})
    assert _scored(example, tokenizer) == " sat"


def test_templates_fill_columns_and_keep_braces(tokenizer: Tokenizer) -> None:
    table: dict[str, object] = {
        "prompt_template": "{{News}}: {text}\nTopic:",
        "completion_template": " {topic}",
        "chat_template": False,
    }
    example = _example(table, tokenizer, {"text": "a {brace}", "topic": "mat"})
    assert tokenizer.decode(example.tokens) == "{News}: a {brace}\nTopic: mat<|im_end|>"


def test_a_prompt_has_the_same_tokens_as_at_generation(tokenizer: Tokenizer) -> None:
    # "the ca" + "t": encoded as one text, the last prompt token would swallow the completion.
    for prompt, completion in [("the ca", "t"), ("the", " cat"), ("the cat s", "at on the mat")]:
        alone = tokenizer.encode(prompt, add_special_tokens=False)
        example = _example(PLAIN, tokenizer, {"p": prompt, "c": completion})
        assert example.tokens[: len(alone)] == alone
        assert _scored(example, tokenizer) == f"{completion}<|im_end|>"
    assert tokenizer.encode("the cat")[: len(tokenizer.encode("the ca"))] != tokenizer.encode(
        "the ca"
    ), "the case tests nothing: no token crosses the border"


def test_completion_alone_scores_all_but_the_first_token(tokenizer: Tokenizer) -> None:
    table: dict[str, object] = {"completion": "c", "chat_template": False}
    example = _example(table, tokenizer, {"c": "the cat sat"})
    assert example.labels[1:] == example.tokens[1:]


def test_start_tokens_of_the_tokenizer_come_first(bare_tokenizer: Tokenizer) -> None:
    class Starting:
        """Puts <|im_start|> before every text, as Llama and Gemma tokenizers do."""

        chat_template = None
        eos_token_id = bare_tokenizer.eos_token_id
        apply_chat_template = bare_tokenizer.apply_chat_template

        def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
            ids: list[int] = bare_tokenizer.encode(text, add_special_tokens=False)
            return [bare_tokenizer.bos_token_id, *ids] if add_special_tokens else ids

    settings = parse_settings(DataSettings, {"train": "t.jsonl", **PLAIN}, where="run.toml")
    limits = RowLimits(context_length=6)
    cut = settings.model_copy(update={"on_too_long": "truncate-prompt"})
    for chosen in (settings, cut):
        maker = RowMaker(chosen, Starting(), limits if chosen is cut else LIMITS)
        example = maker.make(Record({"p": "the cat sat on the mat", "c": " ran"}, "f:1"), 0)
        assert example is not None
        assert example.tokens[0] == bare_tokenizer.bos_token_id
        assert example.tokens.count(bare_tokenizer.bos_token_id) == 1


def test_chat_rows_are_the_templates_own_text(tokenizer: Tokenizer) -> None:
    table: dict[str, object] = {"prompt": "p", "completion": "c"}
    example = _example(table, tokenizer, {"p": "the cat", "c": "sat"})
    messages = [{"role": "user", "content": "the cat"}, {"role": "assistant", "content": "sat"}]
    whole = tokenizer.apply_chat_template(messages, tokenize=False)
    assert tokenizer.decode(example.tokens) == whole.removesuffix("\n")
    assert _scored(example, tokenizer) == "sat<|im_end|>"


def test_the_last_or_all_assistant_turns_are_scored(tokenizer: Tokenizer) -> None:
    last = _example({"messages": "m"}, tokenizer, {"m": TALK})
    every = _example({"messages": "m", "assistant_turns": "all"}, tokenizer, {"m": TALK})
    assert _scored(last, tokenizer) == "ran<|im_end|>"
    assert _scored(every, tokenizer) == "sat<|im_end|>|ran<|im_end|>"
    assert last.tokens == every.tokens


def test_a_template_that_rewrites_earlier_turns_is_refused(bare_tokenizer: Tokenizer) -> None:
    # Like templates that drop the reasoning of earlier turns.
    changing = (
        "{% for m in messages %}{{ m.role }}: "
        "{% if m.role == 'assistant' and not loop.last %}-{% else %}{{ m.content }}{% endif %}. "
        "{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
    )
    bare_tokenizer.chat_template = changing
    try:
        last = _example({"messages": "m"}, bare_tokenizer, {"m": TALK})
        assert _scored(last, bare_tokenizer) == "ran. "  # no end token in this template
        with pytest.raises(DataError, match=r"t.jsonl:3: the chat template changes earlier turns"):
            _make({"messages": "m", "assistant_turns": "all"}, bare_tokenizer, {"m": TALK})
    finally:
        bare_tokenizer.chat_template = None


def test_a_template_that_refuses_a_conversation_names_the_line(bare_tokenizer: Tokenizer) -> None:
    bare_tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    try:
        with pytest.raises(DataError, match=r"t.jsonl:3: the chat template refuses.*alternate"):
            _make({"messages": "m"}, bare_tokenizer, {"m": TALK})
    finally:
        bare_tokenizer.chat_template = None


@pytest.mark.parametrize(
    ("messages", "expected"),
    [
        (None, "no list of messages"),
        ([], "no list of messages"),
        ("hello", "no list of messages"),
        (["hello"], "message 1 is no object"),
        ([{"role": "user"}], "message 1 needs role and content"),
        ([{"role": "assistant", "content": 3}], "message 1 needs role and content"),
        (TALK[:3], "the last message must be the assistant's"),
        ([TALK[0], {"role": "assistant", "content": " "}], "the last message must be"),
        ([TALK[0], {"role": "assistant", "content": "\udc00"}], "surrogate"),
    ],
)
def test_bad_conversations_name_line_and_message(
    messages: object, expected: str, tokenizer: Tokenizer
) -> None:
    with pytest.raises(DataError, match=f"t.jsonl:3: .*{expected}"):
        _make({"messages": "m"}, tokenizer, {"m": messages})


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"p": "the", "c": "  "}, "the completion is empty"),
        ({"p": "\n", "c": "sat"}, "the prompt is empty"),
        ({"p": "the"}, "no column 'c'"),
        ({"p": "the", "c": None}, "column 'c' is null, expected text"),
        ({"p": 3.5, "c": "sat"}, "column 'p' is a value of type float"),
    ],
)
def test_bad_records_name_the_line(
    fields: dict[str, object], expected: str, tokenizer: Tokenizer
) -> None:
    with pytest.raises(DataError, match=f"t.jsonl:3: {expected}"):
        _make(PLAIN, tokenizer, fields)


def test_long_rows_are_errors_that_name_line_and_lengths(tokenizer: Tokenizer) -> None:
    fields: dict[str, object] = {"p": "x" * 300, "c": " sat"}
    with pytest.raises(DataError, match=r"t.jsonl:3: 30\d tokens, 300 of .* at most 256 .*skip"):
        _make(PLAIN, tokenizer, fields)


def test_long_rows_are_skipped_on_demand(tokenizer: Tokenizer) -> None:
    table = {**PLAIN, "on_too_long": "skip", "max_length": 20}
    assert _make(table, tokenizer, {"p": "x" * 30, "c": " sat"}) is None
    assert _make(table, tokenizer, {"p": "x", "c": " sat"}) is not None


def test_a_prompt_is_truncated_from_its_start_and_the_completion_never(
    tokenizer: Tokenizer,
) -> None:
    table = {**PLAIN, "on_too_long": "truncate-prompt", "max_length": 6}
    example = _example(table, tokenizer, {"p": "abcdefgh", "c": "zz"})
    assert tokenizer.decode(example.tokens) == "fghzz<|im_end|>"
    assert _scored(example, tokenizer) == "zz<|im_end|>"
    tightest = _example(table, tokenizer, {"p": "abcdefgh", "c": "zzzz"})
    assert tokenizer.decode(tightest.tokens) == "hzzzz<|im_end|>"
    with pytest.raises(DataError, match="the completion alone does not fit in 6 tokens"):
        _make(table, tokenizer, {"p": "abcdefgh", "c": "zzzzz"})


def test_the_wrong_tokenizer_is_noticed(tokenizer: Tokenizer) -> None:
    limits = RowLimits(context_length=256, vocab_size=10)
    with pytest.raises(DataError, match="for a model with 10; the tokenizer belongs to another"):
        _make(PLAIN, tokenizer, {"p": "the", "c": " cat"}, limits)


def test_settings_that_do_not_fit_tokenizer_or_model_are_refused(
    bare_tokenizer: Tokenizer, tokenizer: Tokenizer
) -> None:
    fields: dict[str, object] = {"m": TALK}
    with pytest.raises(ConfigError, match=r"no chat template; set data.chat_template = false"):
        _make({"messages": "m"}, bare_tokenizer, fields)
    with pytest.raises(ConfigError, match="max_length=512 exceeds the model's context of 256"):
        _make({"messages": "m", "max_length": 512}, tokenizer, fields)


def test_a_row_never_shows_its_content(tokenizer: Tokenizer, jsonl: Callable[..., Path]) -> None:
    example = _example(PLAIN, tokenizer, {"p": "the", "c": " cat"})
    assert repr(example) == "Example(row_id=2)"
    assert "cat" not in repr(Record({"p": "the cat"}, "f:1"))


def test_a_label_that_the_templates_words_contain_is_private_all_the_same(
    tokenizer: Tokenizer,
) -> None:
    table = {
        "prompt_template": "A or B: {p}",
        "completion_template": "\nAnswer: {c}",
        "chat_template": False,
        "append_eos": False,
    }
    example = _example(table, tokenizer, {"p": "A", "c": "A"})
    text = "A or B: A\nAnswer: A"
    assert len(example.tokens) == len(text), "a token a letter, as the tokenizer knows none of it"
    assert [place for place, own in enumerate(example.is_private) if own] == [8, len(text) - 1]


def test_a_message_that_the_chat_templates_words_contain_is_private_all_the_same(
    tokenizer: Tokenizer,
) -> None:
    talk = [{"role": "user", "content": "user"}, {"role": "assistant", "content": "ran"}]
    example = _example({"messages": "m"}, tokenizer, {"m": talk})
    texts = [tokenizer.decode([token]) for token in example.tokens]
    behind = texts.index("\n") + 1
    assert "".join(texts[behind : behind + 4]) == "user"
    assert all(example.is_private[behind : behind + 4])
