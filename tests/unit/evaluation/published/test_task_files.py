"""Questions out to files and back: every mistake is named, nothing is mixed up."""

import re
import tomllib
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

import cutlayer.evaluation.published.catalogue  # noqa: F401
from cutlayer.data.load import load_dataset
from cutlayer.data.settings import DataSettings
from cutlayer.data.sources import read_records
from cutlayer.data.template import RowLimits
from cutlayer.errors import ConfigError, DataError, StorageError
from cutlayer.evaluation.published.question import TASKS, Question
from cutlayer.evaluation.published.task_files import (
    Provenance,
    TaskFolder,
    open_task,
    write_task,
)
from cutlayer.evaluation.published.templates import Form, Template
from cutlayer.evaluation.tasks import ChoiceItem, GenerateItem, read_items

ABOUT = Provenance(source="made up", is_demo_scale=True, seed=3)


def _topic(number: int, topic: str = "tech") -> Question:
    return Question(
        key=f"t/{number}",
        fields={"text": f"Robot number {number} {{sings}}"},
        choices=("sports", "tech"),
        answers=(topic,),
        label=topic,
    )


def _turn(number: int) -> Question:
    fields = {"story": "Ann has a cat.", "history": "", "question": "What has she?"}
    return Question(
        key=f"s/{number}", group="s", fields=fields, answers=("a cat", "cat"), label="made-up"
    )


@pytest.fixture(autouse=True)
def _known(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both tasks, whatever else is registered."""

    class Made:
        about, main_metric, max_new_tokens, hub = "made up", "f1", 7, None

    for name in ("topics", "coqa", "record"):
        monkeypatch.setitem(TASKS._entries, name, Made())


def _topics(folder: Path, form: Form = Form.PLAIN) -> TaskFolder:
    test = [_topic(1), _topic(2, "sports")]
    return write_task("topics", [_topic(3)], test, folder, form, ABOUT)


def test_choices_become_items_with_their_leading_space(tmp_path: Path) -> None:
    task = _topics(tmp_path / "task")
    first, second = read_items(task.test)
    assert isinstance(first, ChoiceItem)
    assert isinstance(second, ChoiceItem)
    assert first.prompt.text is not None
    assert first.prompt.text.startswith("News: Robot number 1 {sings}\nTopic (")
    assert first.choices == (" sports", " tech")
    assert (first.answer, second.answer) == (1, 0)
    (row,) = read_records(task.train)
    assert row.fields["completion"] == " tech"
    assert row.fields["label"] == "tech"


def test_replies_end_at_a_newline_and_keep_every_answer(tmp_path: Path) -> None:
    task = write_task("coqa", [_turn(1)], [_turn(2)], tmp_path, Form.PLAIN, ABOUT)
    (item,) = read_items(task.test)
    assert isinstance(item, GenerateItem)
    assert item.prompt.text == "Ann has a cat.\n\nQ: What has she?\nA:"
    assert (item.answers, item.stop, item.max_new_tokens) == (("a cat", "cat"), ("\n",), 7)


def test_chat_form_has_turns_and_no_leading_space(tmp_path: Path) -> None:
    task = _topics(tmp_path, Form.CHAT)
    item = read_items(task.test)[0]
    assert isinstance(item, ChoiceItem)
    assert item.choices == ("sports", "tech")
    assert [turn["role"] for turn in item.prompt.messages] == ["user"]
    (row,) = read_records(task.train)
    turns = row.fields["messages"]
    assert isinstance(turns, list)
    assert turns[-1] == {"role": "assistant", "content": "tech"}
    assert task.data_settings().messages == "messages"


def _tokenizer() -> PreTrainedTokenizerFast:
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        special_tokens=["<end>"], initial_alphabet=alphabet, show_progress=False
    )
    raw.train_from_iterator(["a"], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<end>")


def test_training_rows_score_the_answer_alone(tmp_path: Path) -> None:
    tokenizer = _tokenizer()
    choice = _topics(tmp_path / "topics")
    reply = write_task("coqa", [_turn(1)], [_turn(2)], tmp_path / "coqa", Form.PLAIN, ABOUT)
    for task, expected in ((choice, " tech"), (reply, f" a cat{tokenizer.eos_token}")):
        rows = load_dataset(task.data_settings(40), tokenizer, RowLimits(context_length=40))
        scored = [label for label in rows.train[0].labels if label >= 0]
        assert tokenizer.decode(scored) == expected


def test_the_page_reads_training_rows_as_the_task_does(tmp_path: Path) -> None:
    page = (Path(__file__).parents[4] / "docs/published-tasks.md").read_text()
    (said,) = re.findall(r"```toml\n(\[data\]\n.*?)```", page, re.DOTALL)
    values = tomllib.loads(said)["data"]
    task = _topics(tmp_path)
    assert DataSettings(**values | {"train": task.train}) == task.data_settings()
    reply = write_task("coqa", [], [_turn(1)], tmp_path, Form.PLAIN, ABOUT).data_settings()
    assert reply == task.data_settings().model_copy(update={"append_eos": True})
    in_chat = {"train": task.train, "messages": "messages", "on_too_long": values["on_too_long"]}
    chat = _topics(tmp_path, Form.CHAT).data_settings()
    # Chat templates bring their own end.
    assert DataSettings(**in_chat) == chat.model_copy(update={"append_eos": True})


def test_a_written_task_opens_again(tmp_path: Path) -> None:
    written = _topics(tmp_path)
    task = open_task(tmp_path)
    assert task == written
    assert (task.about.num_train, task.about.num_test, task.about.seed) == (1, 2, 3)
    questions = task.questions()
    assert [question.key for question in questions] == ["t/1", "t/2"]
    assert [question.answers for question in questions] == [("tech",), ("sports",)]
    assert not questions[0].fields


def test_a_write_that_fails_leaves_no_mixture(tmp_path: Path) -> None:
    task = _topics(tmp_path)
    task.keys.unlink()
    task.keys.mkdir()
    with pytest.raises(StorageError, match="cannot write"):
        _topics(tmp_path, Form.CHAT)
    with pytest.raises(DataError, match=r"it lacks task\.json"):
        open_task(tmp_path)


def test_a_folder_that_is_no_task_says_what_it_lacks(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no task folder, it lacks task\.json, train\.jsonl"):
        open_task(tmp_path)
    _topics(tmp_path)
    (tmp_path / "task.json").write_text('{"task": ')
    with pytest.raises(DataError, match=r"task\.json is damaged"):
        open_task(tmp_path)


def test_keys_of_another_length_are_refused(tmp_path: Path) -> None:
    task = _topics(tmp_path)
    lines = task.keys.read_text().splitlines(keepends=True)
    task.keys.write_text(lines[0])
    with pytest.raises(DataError, match=r"has 1 lines, task\.json says 2"):
        task.questions()
    task.keys.write_text('{"key": 1}\n')
    with pytest.raises(DataError, match=r"keys\.jsonl:1"):
        task.questions()
    for answer in ('["tech"]', '["sports"]'):
        # None, then one that is no choice.
        other = "[]" if "tech" in answer else '["golf"]'
        task.keys.write_text("".join(lines).replace(f'"answers": {answer}', f'"answers": {other}'))
        with pytest.raises(DataError, match=r"keys\.jsonl:[12]: no answer, or one that is no"):
            task.questions()


def test_what_cannot_be_scored_is_not_written(tmp_path: Path) -> None:
    hidden = Question(key="h", fields={"text": "x"}, choices=("sports", "tech"), answers=())
    lacking = Question(key="l", choices=("sports", "tech"), answers=("tech",))
    other = Question(key="o", fields={"text": "x"}, choices=("a", "b"), answers=("c",))
    for question, match in (
        (hidden, "question h has no answer; published test splits keep"),
        (lacking, "question l has no text 'text'"),
        (other, "an answer of question o is no choice"),
        (_turn(1), "some questions have choices and others have none"),
    ):
        with pytest.raises(DataError, match=match):
            write_task("topics", [], [_topic(1), question], tmp_path / "n", Form.PLAIN, ABOUT)
    with pytest.raises(DataError, match="no test question"):
        write_task("topics", [_topic(1)], [], tmp_path / "n", Form.PLAIN, ABOUT)
    with pytest.raises(ConfigError, match="topicz"):
        write_task("topicz", [], [_topic(1)], tmp_path / "n", Form.PLAIN, ABOUT)
    assert not (tmp_path / "n").exists()


def _entities(*choices: str) -> Question:
    fields = {"passage": "A passage.", "query": "@placeholder sings"}
    return Question(key="r/1", fields=fields, choices=choices, answers=choices[:1])


@pytest.mark.parametrize("choices", [("Ann", "Ann "), ("Ann",), ("Ann", " ")])
def test_choices_that_cannot_be_told_apart_are_refused_at_once(
    choices: tuple[str, ...], tmp_path: Path
) -> None:
    with pytest.raises(DataError, match=r"question r/1 has no two different choices.*mend it"):
        write_task("record", [], [_entities(*choices)], tmp_path / "n", Form.PLAIN, ABOUT)
    assert not (tmp_path / "n").exists()


def test_an_own_template_spells_the_tasks_choices_and_each_otherwise(tmp_path: Path) -> None:
    alike = Template(prompt="{text}", choices={"sports": "Tech", "tech": "Tech"})
    unknown = Template(prompt="{text}", choices={"Sports": "Ball games"})
    for words, match in ((alike, "no two different choices"), (unknown, "no choice 'Sports'")):
        with pytest.raises(DataError, match=match):
            write_task("topics", [], [_topic(1)], tmp_path / "n", Form.PLAIN, ABOUT, words)


def test_a_blank_answer_is_not_learnt(tmp_path: Path) -> None:
    blank = Question(key="s/0", fields=_turn(1).fields, answers=(" ", "cat"))
    with pytest.raises(DataError, match="question s/0 has a blank answer to learn"):
        write_task("coqa", [blank], [_turn(1)], tmp_path / "n", Form.PLAIN, ABOUT)
    assert write_task("coqa", [], [blank], tmp_path / "n", Form.PLAIN, ABOUT).about.num_test == 1
