"""Task files: what is read, and what is refused with file and line."""

import json
from pathlib import Path

import pytest

from cutlayer.errors import DataError
from cutlayer.evaluation.tasks import ChoiceItem, GenerateItem, Prompt, read_items

CHOICE: dict[str, object] = {
    "kind": "choice",
    "context": "A cow says",
    "choices": [" moo", " meow"],
    "answer": 0,
}
GENERATE: dict[str, object] = {"kind": "generate", "prompt": "Cow?", "answers": ["moo"]}
TURNS = [{"role": "system", "content": "Be short."}, {"role": "user", "content": "Secret?"}]


def write(path: Path, *items: object) -> Path:
    path.write_text("".join(json.dumps(item) + "\n" for item in items), encoding="utf-8")
    return path


def without(item: dict[str, object], *names: str, **changes: object) -> dict[str, object]:
    return {k: v for k, v in {**item, **changes}.items() if k not in names}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "tasks.jsonl"


def test_both_kinds_are_read_with_their_place(file: Path) -> None:
    full = {"metrics": ["rouge_l", "f1", "f1"], "max_new_tokens": 9, "stop": ["\n"]}
    choice, plain, whole = read_items(write(file, CHOICE, GENERATE, {**GENERATE, **full}))
    assert choice == ChoiceItem(
        where=f"{file}:1",
        prompt=Prompt(text="A cow says"),
        choices=(" moo", " meow"),
        answer=0,
    )
    assert isinstance(plain, GenerateItem)
    assert isinstance(whole, GenerateItem)
    assert (plain.metrics, plain.max_new_tokens, plain.stop) == (("exact_match", "f1"), 64, ())
    assert (whole.metrics, whole.max_new_tokens, whole.stop) == (("rouge_l", "f1"), 9, ("\n",))


def test_messages_stand_for_context_and_prompt(file: Path) -> None:
    first = without(CHOICE, "context", messages=TURNS)
    second = without(GENERATE, "prompt", messages=TURNS)
    for item in read_items(write(file, first, second)):
        assert item.prompt == Prompt(messages=tuple(TURNS))


def test_empty_lines_are_passed_over_and_still_counted(file: Path) -> None:
    file.write_text(f"\n{json.dumps(CHOICE)}\n\n{json.dumps(GENERATE)}\n")
    assert [item.where for item in read_items(file)] == [f"{file}:2", f"{file}:4"]


def test_a_limit_reads_no_further(file: Path) -> None:
    write(file, CHOICE, GENERATE)
    file.write_text(file.read_text() + "{broken")
    assert len(read_items(file, limit=2)) == 2
    with pytest.raises(DataError, match=r"tasks\.jsonl:3: malformed JSON at column 2"):
        read_items(file)


def test_the_suffix_of_the_file_is_free(tmp_path: Path) -> None:
    assert len(read_items(write(tmp_path / "tasks.txt", CHOICE))) == 1


@pytest.mark.parametrize(
    ("item", "message"),
    [
        ([1], "a list, expected one JSON object"),
        (without(CHOICE, "kind"), "no column 'kind'"),
        ({**CHOICE, "kind": "chioce"}, "kind 'chioce' is unknown; did you mean 'choice'?"),
        ({**CHOICE, "kind": 3}, "kind '3' is unknown; known: choice, generate"),
        ({**CHOICE, "anwser": 1}, "field 'anwser' is unknown; did you mean 'answer'?"),
        ({**CHOICE, "choices": []}, "'choices' is not a list of at least one text"),
        ({**CHOICE, "choices": [" moo"]}, "1 choices; give two or more"),
        ({**CHOICE, "choices": [" moo", ""]}, "entry 2 of 'choices' is empty or not text"),
        ({**CHOICE, "choices": [" moo", 7]}, "entry 2 of 'choices' is empty or not text"),
        ({**CHOICE, "choices": [" moo", " moo"]}, "two choices are the same text"),
        ({**CHOICE, "answer": 2}, "answer 2 is not the place of one of 2 choices; .*0 to 1"),
        ({**CHOICE, "answer": -1}, "answer -1 is not"),
        ({**CHOICE, "answer": True}, "answer of type bool is not"),
        ({**CHOICE, "answer": "moo"}, "answer of type str is not"),
        (without(CHOICE, "answer"), "no column 'answer'"),
        ({**CHOICE, "context": ""}, "'context' is empty"),
        ({**CHOICE, "context": 4}, "expected text"),
        ({**CHOICE, "messages": TURNS}, "give 'context' or 'messages', one of the two"),
        (without(GENERATE, "prompt"), "give 'prompt' or 'messages', one of the two"),
        (without(GENERATE, "prompt", messages=[]), "'messages' is not a list of at least one"),
        (without(GENERATE, "prompt", messages=["hi"]), "message 1 is not an object of 'role'"),
        (
            without(GENERATE, "prompt", messages=[{"role": "user"}]),
            "message 1 is not an object of 'role'",
        ),
        (
            without(GENERATE, "prompt", messages=[*TURNS, {"role": "tool", "content": ""}]),
            "message 3 has an unknown role; use one of assistant, system, user",
        ),
        (
            without(GENERATE, "prompt", messages=[{"role": "user", "content": 1}]),
            "message 1 has a content that is not text",
        ),
        ({**GENERATE, "answers": []}, "'answers' is not a list of at least one text"),
        ({**GENERATE, "metrics": ["rougel"]}, r"metric 'rougel' is unknown; did you mean rouge_l"),
        ({**GENERATE, "metrics": []}, "'metrics' is not a list of at least one"),
        ({**GENERATE, "max_new_tokens": 0}, "'max_new_tokens' is not an integer above 0"),
        ({**GENERATE, "max_new_tokens": True}, "'max_new_tokens' is not an integer above 0"),
        ({**GENERATE, "stop": [""]}, "entry 1 of 'stop' is empty"),
        ({**GENERATE, "prompt": "\ud800"}, "half a surrogate pair"),
    ],
)
def test_a_wrong_item_is_named_by_file_and_line(file: Path, item: object, message: str) -> None:
    with pytest.raises(DataError, match=rf"tasks\.jsonl:2: .*{message}") as caught:
        read_items(write(file, CHOICE, item))
    assert "cow" not in str(caught.value).lower()
    assert "Secret" not in str(caught.value)


def test_a_missing_empty_or_unreadable_file_is_named(tmp_path: Path, file: Path) -> None:
    with pytest.raises(DataError, match=r"tasks\.jsonl does not exist"):
        read_items(file)
    file.write_text("\n\n")
    with pytest.raises(DataError, match=r"tasks\.jsonl has no records"):
        read_items(file)
    file.write_bytes(b"\xff\n")
    with pytest.raises(DataError, match=r"tasks\.jsonl:1: .*not UTF-8"):
        read_items(file)
    with pytest.raises(DataError, match="is a folder"):
        read_items(tmp_path)


def test_an_item_does_not_print_its_text(file: Path) -> None:
    assert "cow" not in repr(read_items(write(file, CHOICE, GENERATE))).lower()
