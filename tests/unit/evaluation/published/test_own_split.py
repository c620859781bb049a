"""Sentiment and topics in our own split, on the real assets and on made-up files."""

from collections import Counter
from pathlib import Path

import pytest

from cutlayer.data.assets import fetch
from cutlayer.data.domains import DOMAINS
from cutlayer.data.resemblance import Resembling
from cutlayer.data.sources import Record
from cutlayer.data.topics import TOPICS
from cutlayer.errors import DataError
from cutlayer.evaluation.published.catalogue import published_task
from cutlayer.evaluation.published.own_split import own_split
from cutlayer.evaluation.published.question import Question, Split

_SENTIMENT, _TOPICS = published_task("sentiment"), published_task("topics")


def _texts(questions: list[Question]) -> list[str]:
    return [question.fields["text"] for question in questions]


def _movies(folder: Path, *lines: str) -> Path:
    (folder / DOMAINS["movies"]).write_text("".join(f"{line}\n" for line in lines))
    return folder


def _made_up(count: int) -> list[str]:
    """Half of them good, no two alike."""
    return [f"{n}\t{(-1) ** n * 0.1}\tfilm{n} is{n} w{n} so" for n in range(count)]


def test_the_real_articles_are_split_once_and_for_all() -> None:
    folder = fetch("bbcnews")
    train, test = (_TOPICS.read_original(folder, split) for split in (Split.TRAIN, Split.TEST))
    assert (len(train), len(test)) == (1548, 516)
    assert min(Counter(question.label for question in test).values()) == 71
    assert test[0].key == "test/0005ee9093f3ea02"
    assert len({question.key for question in (*train, *test)}) == len(train) + len(test)
    tested = Resembling(_texts(test))
    assert not any(text in tested for text in _texts(train))


def test_the_real_snippets_have_a_fixed_test_split_of_both_sentiments() -> None:
    test = _SENTIMENT.read_original(fetch("sentiment"), Split.TEST)
    assert Counter(question.label for question in test) == {"positive": 1333, "negative": 1308}
    assert test[0].key == "test/00031b06991bbec5"
    assert len({question.key for question in test}) == len(test)


def test_the_sign_of_a_score_is_the_sentiment_and_zero_has_none(tmp_path: Path) -> None:
    folder = _movies(tmp_path, *_made_up(40), "40\t0.0\tneither this nor that")
    train, test = (_SENTIMENT.read_original(folder, split) for split in (Split.TRAIN, Split.TEST))
    assert (len(train), len(test)) == (30, 10)
    for question in (*train, *test):
        number = int(question.fields["text"].split()[0].removeprefix("film"))
        assert question.answers == (("positive", "negative")[number % 2],)
        assert question.choices == ("negative", "positive")


def test_other_lines_of_a_file_do_not_change_a_rows_key(tmp_path: Path) -> None:
    first = _SENTIMENT.read_original(_movies(tmp_path, *_made_up(8)), Split.TRAIN)
    again = _SENTIMENT.read_original(_movies(tmp_path, *reversed(_made_up(8))), Split.TRAIN)
    assert again == first


def test_training_rows_that_resemble_test_rows_are_left_out() -> None:
    rows = ["one two three four five", "six seven", "two one three four 5", "eight", "nine"]
    assert own_split(rows, str, Split.TEST, "it") == rows[:1]
    assert own_split(rows, str, Split.TRAIN, "it") == ["six seven", "eight", "nine"]


def test_what_cannot_be_split_is_named(tmp_path: Path) -> None:
    _movies(tmp_path, *_made_up(8))
    with pytest.raises(DataError, match="has no validation split; use its train or test split"):
        _SENTIMENT.read_original(tmp_path, Split.VALIDATION)
    with pytest.raises(DataError, match="has 3 usable rows, too few to split"):
        _SENTIMENT.read_original(_movies(tmp_path, *_made_up(3)), Split.TEST)
    with pytest.raises(DataError, match=r"GroundTruth.txt:9 is not id, score and text"):
        _SENTIMENT.read_original(_movies(tmp_path, *_made_up(8), "8\t1.0"), Split.TEST)
    with pytest.raises(DataError, match="business has no article"):
        _TOPICS.read_original(tmp_path, Split.TEST)


def test_records_with_columns_text_and_label_are_read() -> None:
    records = [
        Record({"text": "fine film", "label": 1}, "row 1"),
        Record({"text": "dull film", "label": "negative"}, "row 2"),
    ]
    questions = _SENTIMENT.read_records(records, Split.TRAIN)
    assert [question.answers for question in questions] == [("positive",), ("negative",)]
    assert [question.key for question in questions] == ["train/1", "train/2"]
    (topic,) = _TOPICS.read_records(
        [Record({"text": "a match", "label": "sports"}, "row")], Split.TEST
    )
    assert (topic.answers, topic.choices) == (("sports",), TOPICS)
    with pytest.raises(DataError, match=r"row 3: column 'label' holds no label .* 4 \(tech\)"):
        _TOPICS.read_records([Record({"text": "a match", "label": "cars"}, "row 3")], Split.TEST)
