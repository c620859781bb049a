"""Packaged questions: all of them, never a text on both sides, and the same choice every time."""

import json
from collections import Counter
from pathlib import Path

import pytest

from cutlayer.data.assets import fetch
from cutlayer.errors import ConfigError, DataError, StorageError
from cutlayer.evaluation.published import evaluation_asset
from cutlayer.evaluation.published.near_copies import families, split_by_text
from cutlayer.evaluation.published.packaged import PACKAGED, choose, packaged_questions
from cutlayer.evaluation.published.question import Question, Split
from cutlayer.evaluation.published.task_files import Provenance, write_task
from cutlayer.evaluation.published.templates import Form
from cutlayer.evaluation.tasks import read_items
from tests.unit.evaluation.published.made_up_asset import made_up_archive, pin

TEXT = {"coqa": "story", "xsum": "document", "cnn_dailymail": "document", "multirc": "paragraph"}


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache with a made-up asset `evaluation`."""
    archive = made_up_archive(tmp_path / "bigbench-1.0.0.tar.gz")
    pin(archive, monkeypatch)
    fetch("evaluation", tmp_path / "cache", archive)
    return tmp_path / "cache"


class TestEveryPackagedTask:
    """What holds for all of them: each fits its template, and no question is on both sides."""

    @pytest.mark.parametrize("name", list(PACKAGED))
    def test_its_questions_become_files(self, name: str, cache: Path, tmp_path: Path) -> None:
        # The small assets are real, and in the usual cache.
        split = packaged_questions(name, cache if name in TEXT else None)
        keys = [question.key for side in split.values() for question in side]
        assert len(set(keys)) == len(keys)
        train, test = choose(split, 3, 3, seed=0)
        about = Provenance(source="packaged", is_demo_scale=True)
        for form in Form:
            task = write_task(name, train, test, tmp_path / form, form, about)
            assert len(read_items(task.test)) == len(test) == task.about.num_test
            assert [q.key for q in task.questions()] == [q.key for q in test]


@pytest.mark.parametrize(
    ("name", "num_questions"), [("coqa", 24), ("xsum", 15), ("cnn_dailymail", 12), ("multirc", 34)]
)
def test_every_question_is_on_one_side(name: str, num_questions: int, cache: Path) -> None:
    split = packaged_questions(name, cache)
    assert set(split) == {Split.TRAIN, Split.TEST}
    train, test = split[Split.TRAIN], split[Split.TEST]
    assert len(train) + len(test) == num_questions
    assert len({question.key for question in train + test}) == num_questions
    texts = [{question.fields[TEXT[name]] for question in side} for side in (train, test)]
    assert all(texts)
    assert not texts[0] & texts[1]
    assert packaged_questions(name, cache) == split


def test_multirc_options_are_told_apart(cache: Path) -> None:
    split = packaged_questions("multirc", cache)
    groups: dict[str, list[Question]] = {}
    for question in split[Split.TRAIN] + split[Split.TEST]:
        groups.setdefault(question.group, []).append(question)
    assert Counter(map(len, groups.values())) == {3: 11, 1: 1}
    (three, *_) = [group for group in groups.values() if len(group) == 3]
    assert [question.fields["answer"] for question in three] == ["red", "green, or", "it"]
    assert [question.answers[0] for question in three] == ["yes", "no", "yes"]
    assert three[0].fields["paragraph"].endswith(". It ends.")
    assert "Sent" not in three[0].fields["paragraph"]
    assert three[0].fields["question"].endswith("?")


def test_coqa_keeps_every_annotator(cache: Path) -> None:
    question = packaged_questions("coqa", cache)[Split.TEST][0]
    assert question.answers == ("one 1", "two 1")


def test_the_large_asset_is_never_fetched_unasked(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="run cutlayer assets fetch evaluation"):
        packaged_questions("coqa", tmp_path)


def test_a_task_that_no_asset_has_names_those_there_are(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no packaged rows of 'boolq', only of cnn_daily"):
        packaged_questions("boolq", tmp_path)
    assert set(TEXT) < set(PACKAGED)


@pytest.mark.parametrize(
    ("given", "match"),
    [
        ({"input": "no paragraph", "target": ["A."]}, "no paragraph with a question"),
        ({"input": "Paragraph- a \nQuestion: b?", "target": ["A."]}, "without an option"),
        ({"input": "Paragraph- a \nQuestion: b? (A) c", "target": ["B."]}, "is no option"),
        ({"input": "Paragraph- a \nQuestion: b? (A) c", "target": ["A.", "A."]}, "2 targets"),
    ],
)
def test_what_does_not_parse_is_an_error(
    given: dict[str, object], match: str, tmp_path: Path
) -> None:
    folder = tmp_path / "natural_instructions/subtask058_multirc_question_answering"
    folder.mkdir(parents=True)
    (folder / "task.json").write_text(json.dumps({"examples": [given]}))
    with pytest.raises(DataError, match=match):
        evaluation_asset.multirc(tmp_path)


def test_a_damaged_line_is_named(tmp_path: Path) -> None:
    (tmp_path / "factuality_of_summary").mkdir()
    (tmp_path / "factuality_of_summary/cnn_dm.json").write_text('# one\n# two\n{"source": "cut')
    with pytest.raises(DataError, match=r"cnn_dm\.json:3: malformed JSON"):
        evaluation_asset.cnn_dailymail(tmp_path)
    (tmp_path / "factuality_of_summary/cnn_dm.json").write_text("# one\n# two\n" + "[" * 100_000)
    with pytest.raises(DataError, match=r"cnn_dm\.json:3: malformed JSON: nested too deep"):
        evaluation_asset.cnn_dailymail(tmp_path)


def test_near_copies_are_one_family() -> None:
    words = [f"w{number}" for number in range(40)]
    text = " ".join(words)
    changed = " ".join([*words[:20], "CHANGED", *words[21:]])
    part = " ".join(["New", "beginning", *words[25:]])
    other = " ".join(f"o{number}" for number in range(40))
    assert families([other, text, changed.upper(), part, "short", "Short"]) == [0, 1, 1, 1, 4, 4]
    assert families([other, " ".join([*other.split()[:9], *words])]) == [0, 1]


def test_texts_that_each_copied_a_little_do_not_hide_a_copy() -> None:
    words = [f"w{number}" for number in range(98)]
    # Each has a seventh of the runs, together they have all of them.
    borrowers = [
        " ".join([*words[start : start + 20], *(f"{start}own{number}" for number in range(90))])
        for start in range(0, 91, 13)
    ]
    copied = " ".join(words)
    assert families([*borrowers, copied, copied.upper()]) == [0, 1, 2, 3, 4, 5, 6, 7, 7]


def test_copies_go_to_one_side_wherever_they_stand() -> None:
    text = [" ".join(f"{number}x{place}" for place in range(20)) for number in range(40)]
    asked = [
        Question(key=f"{number}", fields={"text": words}, answers=("a",))
        for number, words in enumerate([*text, *(f"{words} again" for words in text)])
    ]
    split = split_by_text(asked, "text")
    test = {int(question.key) for question in split[Split.TEST]}
    assert test == {place for number in test for place in (number % 40, number % 40 + 40)}
    assert 8 <= len(test) // 2 <= 24
    shuffled = split_by_text(reversed(asked), "text")
    assert {int(question.key) for question in shuffled[Split.TEST]} == test


def _choices(split: str, num: int) -> list[Question]:
    return [
        Question(
            key=f"{split}/{number}",
            fields={"text": "word " * (number % 7 + 1)},
            choices=("no", "yes"),
            answers=("yes" if number % 4 else "no",),
        )
        for number in range(num)
    ]


BY_SPLIT = {Split.TRAIN: _choices("train", 60), Split.TEST: _choices("test", 40)}


def test_scored_rows_are_the_same_for_every_seed_and_size() -> None:
    train, test = choose(BY_SPLIT, 20, 16, seed=0)
    other_train, other_test = choose(BY_SPLIT, 20, 8, seed=1)
    assert other_test == test[:8]
    assert other_train != train
    assert choose(BY_SPLIT, 20, 16, seed=0) == (train, test)
    for rows in (train, test, other_train, other_test):
        assert Counter(question.answers[0] for question in rows).most_common()[0][1] * 2 == len(
            rows
        )


def test_all_rows_are_taken_where_no_number_is_given() -> None:
    train, test = choose(BY_SPLIT, None, None, seed=0)
    assert (len(train), len(test)) == (60, 40)
    assert choose(BY_SPLIT, 0, 1, seed=0)[0] == []


def test_long_questions_are_left_out() -> None:
    train, test = choose(BY_SPLIT, 10, 10, seed=0, max_words=6)
    assert all(len(question.fields["text"].split()) <= 3 for question in train + test)
    long = [*_choices("train", 7)[6:]]
    with pytest.raises(DataError, match="1 train rows wanted, 0 are there"):
        choose({**BY_SPLIT, Split.TRAIN: long}, None, 10, seed=0, max_words=6)
    with pytest.raises(DataError, match="40 test rows wanted, 18 are there"):
        choose(BY_SPLIT, 10, 40, seed=0, max_words=6)


def test_options_are_scored_together_or_not_at_all(cache: Path) -> None:
    split = packaged_questions("multirc", cache)
    _, test = choose(split, 2, 8, seed=0)
    sizes = Counter(question.group for question in test)
    everything = Counter(question.group for question in split[Split.TEST])
    assert all(sizes[group] == everything[group] for group in sizes)
    assert 5 <= len(test) <= 8
    with pytest.raises(DataError, match="not one whole group"):
        choose({Split.TEST: [q for q in test if sizes[q.group] == 3]}, 0, 1, seed=0)


def test_a_long_option_takes_its_whole_question_along() -> None:
    options = [
        Question(
            key=f"{group}/{words}",
            group=group,
            fields={"answer": "word " * words},
            choices=("no", "yes"),
            answers=("no",),
        )
        for group, lengths in (("a", (1, 9)), ("b", (1, 2)))
        for words in lengths
    ]
    train, test = choose({Split.TRAIN: options, Split.TEST: options}, 3, None, 0, max_words=6)
    # Each option is learnt on its own, but one of two would pass for a whole question.
    assert {question.key for question in train} == {"a/1", "b/1", "b/2"}
    assert [question.key for question in test] == ["b/1", "b/2"]


def test_a_test_split_without_answers_gives_way_to_validation() -> None:
    hidden = [Question(key="h", choices=("no", "yes"), answers=())]
    held = {Split.TRAIN: BY_SPLIT[Split.TRAIN], Split.TEST: hidden}
    with pytest.raises(DataError, match="no test split with answers and no validation split"):
        choose(held, 1, 1, seed=0)
    _, test = choose({**held, Split.VALIDATION: _choices("val", 4)}, 1, 2, seed=0)
    assert all(question.key.startswith("val/") for question in test)
    with pytest.raises(DataError, match="no train split"):
        choose({Split.TEST: BY_SPLIT[Split.TEST]}, 1, 1, seed=0)
