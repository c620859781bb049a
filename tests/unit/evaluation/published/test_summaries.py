"""XSum and CNN/DailyMail: original files and the hub's columns make the same questions."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from cutlayer.data.sources import Record
from cutlayer.errors import DataError
from cutlayer.evaluation.published.question import Prediction, PublishedTask, Question, Split
from cutlayer.evaluation.published.summaries import CnnDailyMail, XSum

SPLITS = {"train": ["101", "102"], "validation": ["201"], "test": ["301"]}
PAGE = """[SN]URL[SN]
http://example.org/{key}

[SN]TITLE[SN]
Not the summary

[SN]FIRST-SENTENCE[SN]
A bridge was mended in {key} days.

[SN]RESTBODY[SN]
Share this with
Email
Workers began in spring.

They used new stone.
Copy this link
"""
ADDRESSES = {
    "train": ["http://example.org/a", "http://example.org/b"],
    "val": ["http://example.org/c"],
    "test": ["http://example.org/d"],
}
STORY = """A boat sank near the pier

Nobody was hurt. (Photo)

@highlight

Boat sinks at {address}

@highlight

"Nobody hurt"
"""


def xsum_folder(folder: Path) -> Path:
    pages = folder / "bbc-summary-data"
    pages.mkdir()
    for key in (key for keys in SPLITS.values() for key in keys):
        (pages / f"{key}.summary").write_text(PAGE.format(key=key))
    path = folder / "XSum-TRAINING-DEV-TEST-SPLIT-90-5-5.json"
    path.write_text(json.dumps(SPLITS))
    return folder


def cnn_folder(folder: Path) -> Path:
    """The first address of a list is CNN's, the others are the Daily Mail's."""
    for newspaper in ("cnn", "dailymail"):
        (folder / newspaper / "stories").mkdir(parents=True)
    for split, addresses in ADDRESSES.items():
        (folder / f"all_{split}.txt").write_text("\n".join(addresses) + "\n")
        for newspaper, address in zip(("cnn", "dailymail"), addresses, strict=False):
            path = folder / newspaper / "stories" / f"{sha1(address)}.story"
            path.write_text(STORY.format(address=address))
    return folder


def sha1(address: str) -> str:
    return hashlib.sha1(address.encode()).hexdigest()


def keys(questions: Sequence[Question]) -> list[str]:
    return [question.key for question in questions]


def test_xsum_s_first_sentence_is_the_summary_of_the_rest(tmp_path: Path) -> None:
    folder = xsum_folder(tmp_path)
    first, _ = XSum().read_original(folder, Split.TRAIN)
    assert first.fields == {"document": "Workers began in spring.\nThey used new stone."}
    assert first.answers == ("A bridge was mended in 101 days.",)
    assert (first.key, first.group, first.label) == ("101", "101", "")


def test_each_split_of_xsum_has_its_pages(tmp_path: Path) -> None:
    folder = xsum_folder(tmp_path)
    for split in Split:
        assert keys(XSum().read_original(folder, split)) == SPLITS[split.value]


def test_the_list_of_a_split_may_be_given_itself(tmp_path: Path) -> None:
    folder = xsum_folder(tmp_path)
    path = folder / "XSum-TRAINING-DEV-TEST-SPLIT-90-5-5.json"
    assert XSum().read_original(path, Split.TEST) == XSum().read_original(folder, Split.TEST)
    cnn_folder(tmp_path)
    cnn = CnnDailyMail()
    assert cnn.read_original(folder / "all_test.txt", Split.TEST) == cnn.read_original(
        folder, Split.TEST
    )


def test_cnn_s_highlights_are_lines_and_captions_get_a_period(tmp_path: Path) -> None:
    folder = cnn_folder(tmp_path)
    first, second = CnnDailyMail().read_original(folder, Split.TRAIN)
    assert first.fields == {"document": "A boat sank near the pier . Nobody was hurt. (Photo)"}
    assert first.answers == ('Boat sinks at http://example.org/a .\n"Nobody hurt"',)
    assert (first.label, second.label) == ("cnn", "dailymail")


def test_each_split_of_cnn_has_its_addresses(tmp_path: Path) -> None:
    folder = cnn_folder(tmp_path)
    names = {Split.TRAIN: "train", Split.VALIDATION: "val", Split.TEST: "test"}
    for split, name in names.items():
        expected = [sha1(address) for address in ADDRESSES[name]]
        assert keys(CnnDailyMail().read_original(folder, split)) == expected


def test_url_lists_may_stand_in_their_own_folder_and_repeat(tmp_path: Path) -> None:
    folder = cnn_folder(tmp_path)
    (folder / "url_lists").mkdir()
    address = ADDRESSES["train"][0]
    (folder / "all_train.txt").unlink()
    (folder / "url_lists" / "all_train.txt").write_text(f"{address}\r\n\r\n{address}\r\n")
    assert keys(CnnDailyMail().read_original(folder, Split.TRAIN)) == [sha1(address)]


def test_an_article_of_highlights_alone_is_left_out_as_on_the_hub(tmp_path: Path) -> None:
    folder = cnn_folder(tmp_path)
    path = folder / "cnn" / "stories" / f"{sha1(ADDRESSES['train'][0])}.story"
    path.write_text("\n@highlight\n\nA boat sinks\n")
    assert keys(CnnDailyMail().read_original(folder, Split.TRAIN)) == [sha1(ADDRESSES["train"][1])]


@pytest.mark.parametrize(
    ("task", "make", "columns"),
    [
        (XSum(), xsum_folder, ("document", "summary")),
        (CnnDailyMail(), cnn_folder, ("article", "highlights")),
    ],
)
def test_the_hub_s_columns_make_the_same_questions(
    task: PublishedTask, make: object, columns: tuple[str, str], tmp_path: Path
) -> None:
    folder = xsum_folder(tmp_path) if make is xsum_folder else cnn_folder(tmp_path)
    original = task.read_original(folder, Split.TEST)
    rows = [
        {columns[0]: it.fields["document"], columns[1]: it.answers[0], "id": it.key}
        for it in original
    ]
    records = [Record(row, f"row {number}") for number, row in enumerate(rows, start=1)]
    (found,) = task.read_records(records, Split.TEST)
    (expected,) = original
    assert (found.key, found.fields, found.answers) == (
        expected.key,
        expected.fields,
        expected.answers,
    )


@pytest.mark.parametrize("task", [XSum(), CnnDailyMail()])
def test_a_summary_scores_by_rouge(task: PublishedTask) -> None:
    question = Question(key="1", answers=("A boat sank.\nNobody was hurt.",))
    scored = task.score([question], [Prediction(text=question.answers[0])])
    assert scored.items[task.main_metric] == (1.0,)


@pytest.mark.parametrize("end", ["[SN]URL", "[SN]TITLE", "[SN]FIRST", "[SN]RESTBODY", "BODY[SN]"])
def test_a_truncated_page_is_named(tmp_path: Path, end: str) -> None:
    folder = xsum_folder(tmp_path)
    path = folder / "bbc-summary-data" / "102.summary"
    path.write_text(path.read_text().split(end)[0])
    with pytest.raises(DataError, match=r"102\.summary.*fetch it again"):
        XSum().read_original(folder, Split.TRAIN)


def test_a_missing_page_is_named(tmp_path: Path) -> None:
    folder = xsum_folder(tmp_path)
    (folder / "bbc-summary-data" / "301.summary").unlink()
    with pytest.raises(DataError, match=r"cannot read .*301\.summary: No such file"):
        XSum().read_original(folder, Split.TEST)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"train": ["101"]}', "no column 'validation'"),
        ('{"validation": "201"}', "json: validation is no list"),
        ('{"validation": [201]}', "json: validation: column '0' is a value of type int"),
        ('{"validation": ["201", "201"]}', "page 201 is listed twice"),
        ('{"validation": ["../301"]}', "301' is no number of a page"),
        ("[]", "no JSON object of splits"),
        ('{"validation": ["2', "malformed JSON.*fetch it again"),
        ("", "is empty; fetch it again"),
    ],
)
def test_a_damaged_file_of_splits_is_named(tmp_path: Path, text: str, message: str) -> None:
    folder = xsum_folder(tmp_path)
    (folder / "XSum-TRAINING-DEV-TEST-SPLIT-90-5-5.json").write_text(text)
    with pytest.raises(DataError, match=message):
        XSum().read_original(folder, Split.VALIDATION)


def test_a_folder_without_lists_says_what_was_looked_for(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"holds no XSum-TRAINING-DEV-TEST-SPLIT-90-5-5\.json"):
        XSum().read_original(tmp_path, Split.TEST)
    with pytest.raises(DataError, match=r"holds no all_test\.txt or url_lists/all_test\.txt"):
        CnnDailyMail().read_original(tmp_path, Split.TEST)


def test_a_missing_story_is_named_by_its_line(tmp_path: Path) -> None:
    folder = cnn_folder(tmp_path)
    name = f"{sha1(ADDRESSES['train'][1])}.story"
    (folder / "dailymail" / "stories" / name).unlink()
    with pytest.raises(DataError, match=rf"all_train\.txt:2: .* cnn/stories/{name} nor dailymail"):
        CnnDailyMail().read_original(folder, Split.TRAIN)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("A boat sank near", "has no summary; it may be truncated"),
        ("A boat sank\n\n@highlight\n", "has no summary; it may be truncated"),
        ("", "is empty; fetch it again"),
    ],
)
def test_a_truncated_story_is_named(tmp_path: Path, text: str, message: str) -> None:
    folder = cnn_folder(tmp_path)
    path = folder / "cnn" / "stories" / f"{sha1(ADDRESSES['test'][0])}.story"
    path.write_text(text)
    with pytest.raises(DataError, match=message) as caught:
        CnnDailyMail().read_original(folder, Split.TEST)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"summary": " "}, "row 7 has no summary"),
        ({"summary": None}, "row 7: column 'summary' is null"),
        ({"id": 5}, "row 7: column 'id' is a value of type int"),
    ],
)
def test_a_hub_record_of_another_form_is_refused(changes: dict[str, object], message: str) -> None:
    row = {"document": "text", "summary": "sum", "id": "1"} | changes
    with pytest.raises(DataError, match=message):
        XSum().read_records([Record(row, "row 7")], Split.TRAIN)
    with pytest.raises(DataError, match="no column 'article'"):
        CnnDailyMail().read_records([Record({"id": "1"}, "row 7")], Split.TRAIN)


def test_an_id_that_comes_twice_is_named() -> None:
    fields = {"document": "text", "summary": "sum", "id": "1"}
    records = [Record(fields, where) for where in ("row 7", "row 8")]
    with pytest.raises(DataError, match="row 8: a second record 1; its id must differ"):
        XSum().read_records(records, Split.TRAIN)
