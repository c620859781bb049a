"""XSum and CNN/DailyMail: news articles and their summaries.

It makes no prompt (`templates`) and computes no score (`scores`); what the hub's own scripts leave
out or mend in the original files, it leaves out and mends too, so that both give the same rows.
"""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from cutlayer.data.sources import Record
from cutlayer.errors import DataError
from cutlayer.evaluation.published.columns import read_distinct
from cutlayer.evaluation.published.original_files import file_of, json_file, text_file, texts_of
from cutlayer.evaluation.published.question import (
    TASKS,
    HubName,
    Prediction,
    Question,
    Scored,
    Split,
)
from cutlayer.evaluation.published.scores import score_rouge

__all__ = ["CnnDailyMail", "XSum"]

_XSUM_SPLITS = "XSum-TRAINING-DEV-TEST-SPLIT-90-5-5.json"
_BUTTONS = frozenset(
    {
        "Share this with",
        "Email",
        "Facebook",
        "Messenger",
        "Twitter",
        "Pinterest",
        "WhatsApp",
        "Linkedin",
        "LinkedIn",
        "Copy this link",
        "These are external links and will open in a new window",
    }
)
"""Lines of the web page that are no part of the article."""

_URL_LISTS = {
    Split.TRAIN: "all_train.txt",
    Split.VALIDATION: "all_val.txt",
    Split.TEST: "all_test.txt",
}
_NEWSPAPERS = ("cnn", "dailymail")
_SENTENCE_ENDS = (".", "!", "?", "'", "`", '"', "\u2019", "\u201d", ")")


@TASKS.register("xsum")
class XSum:
    """One sentence that says what a BBC article is about.

    `Question.fields`: document, which is empty for the few pages without a text. The key is the
    page's number at the BBC, in the original files and on the hub.

    Source: Narayan et al., XSum (arXiv 1808.08745); the hub's script `xsum.py` 1.2.0.
    """

    about = "one-sentence summaries of BBC articles"
    main_metric = "rouge_l"
    max_new_tokens = 64
    hub: HubName | None = HubName(repository="EdinburghNLP/xsum")

    def read_original(self, folder: Path, split: Split) -> list[Question]:
        """Articles of `bbc-summary-data/*.summary` that the file of splits names."""
        path = file_of(folder, [_XSUM_SPLITS])
        splits = json_file(path)
        if not isinstance(splits, dict):
            raise DataError(f"{path} holds no JSON object of splits; fetch it again")
        keys = texts_of(Record(splits, str(path)).value(split.value), f"{path}: {split.value}")
        _check_page_numbers(keys, path)
        pages = path.parent / "bbc-summary-data"
        return [_bbc_question(pages / f"{key}.summary", key) for key in keys]

    def read_records(self, records: Iterable[Record], split: Split) -> list[Question]:
        """Rows with the columns document, summary and id."""
        return _hub_questions(records, "document", "summary")

    def score(self, questions: Sequence[Question], predictions: Sequence[Prediction]) -> Scored:
        """ROUGE-1, -2, -L and -Lsum."""
        return score_rouge(questions, predictions)


@TASKS.register("cnn_dailymail")
class CnnDailyMail:
    """The highlights of an article of CNN or the Daily Mail, one a line.

    `Question.fields`: document. The key is the SHA-1 of the article's address, in the original
    files and on the hub; the label is the newspaper, which only the original files tell.

    Source: See et al., Get To The Point (arXiv 1704.04368), `make_datafiles.py`; the hub's script
        `cnn_dailymail.py` 3.0.0 (upper case kept, articles without text left out).
    """

    about = "highlights of articles of CNN and the Daily Mail"
    main_metric = "rouge_l"
    max_new_tokens = 128
    hub: HubName | None = HubName(repository="abisee/cnn_dailymail", config="3.0.0")

    def read_original(self, folder: Path, split: Split) -> list[Question]:
        """Articles of `cnn/stories` and `dailymail/stories` whose addresses the split lists."""
        name = _URL_LISTS[split]
        path = file_of(folder, [name, f"url_lists/{name}"])
        root = folder if folder.is_dir() else path.parent
        found = [_story_question(story) for story in _stories(root, path)]
        return [question for question in found if question.fields["document"]]

    def read_records(self, records: Iterable[Record], split: Split) -> list[Question]:
        """Rows with the columns article, highlights and id."""
        return _hub_questions(records, "article", "highlights")

    def score(self, questions: Sequence[Question], predictions: Sequence[Prediction]) -> Scored:
        """ROUGE-1, -2, -L and -Lsum."""
        return score_rouge(questions, predictions)


def _hub_questions(records: Iterable[Record], document: str, summary: str) -> list[Question]:
    def read(record: Record) -> Question:
        texts = (record.text(name) for name in ("id", document, summary))
        return _question(*texts, where=record.where)

    return read_distinct(records, read, "its id")


def _question(
    key: str, document: str, summary: str, *, where: str | Path, label: str = ""
) -> Question:
    if not summary.strip():
        raise DataError(f"{where} has no summary; it may be truncated, fetch it again")
    return Question(
        key=key, group=key, fields={"document": document}, answers=(summary,), label=label
    )


def _check_page_numbers(keys: Sequence[str], path: Path) -> None:
    # A key with slashes would reach outside the folder.
    if wrong := next((key for key in keys if not key.isalnum()), None):
        raise DataError(f"{path}: {wrong!r} is no number of a page; fetch the file again")
    if len(set(keys)) < len(keys):
        doubled = next(key for key in keys if keys.count(key) > 1)
        raise DataError(f"{path}: page {doubled} is listed twice; fetch the file again")


def _bbc_question(path: Path, key: str) -> Question:
    """Sections begin with lines such as `[SN]RESTBODY[SN]`; the first sentence is the summary."""
    lines = (line.strip() for line in text_file(path).split("\n"))
    text = "\n".join(line for line in lines if line and line not in _BUTTONS)
    pieces = text.split("[SN]")
    sections = dict(zip(pieces[1::2], pieces[2::2], strict=False))
    for name in ("FIRST-SENTENCE", "RESTBODY"):
        if name not in sections:
            raise DataError(f"{path} has no section {name}; it may be truncated, fetch it again")
    document, summary = sections["RESTBODY"].strip(), sections["FIRST-SENTENCE"].strip()
    return _question(key, document, summary, where=path)


def _stories(folder: Path, url_list: Path) -> Iterator[Path]:
    """Files of the listed addresses, each once."""
    lines = enumerate(text_file(url_list).split("\n"), start=1)
    line_of_url = {line.strip(): number for number, line in reversed(list(lines)) if line.strip()}
    for url, number in sorted(line_of_url.items(), key=lambda item: item[1]):
        # Not for secrecy: the archives name their files so.
        name = f"{hashlib.sha1(url.encode(), usedforsecurity=False).hexdigest()}.story"
        paths = [folder / newspaper / "stories" / name for newspaper in _NEWSPAPERS]
        path = next((path for path in paths if path.is_file()), None)
        if path is None:
            looked_for = " nor ".join(str(path.relative_to(folder)) for path in paths)
            raise DataError(
                f"{url_list}:{number}: {folder} has neither {looked_for}; "
                "unpack the stories of both newspapers there"
            )
        yield path


def _story_question(path: Path) -> Question:
    """What follows a line `@highlight` is a highlight, what comes before the first the article."""
    article: list[str] = []
    highlights: list[str] = []
    target = article
    for line in map(str.strip, text_file(path).split("\n")):
        if line.startswith("@highlight"):
            target = highlights
        elif line:
            target.append(_with_period(line))
    return _question(
        path.stem,
        " ".join(article),
        "\n".join(highlights),
        where=path,
        label=path.parent.parent.name,
    )


def _with_period(line: str) -> str:
    """Captions lack a full stop and would run on into the next sentence."""
    return line if "@highlight" in line or line.endswith(_SENTENCE_ENDS) else line + " ."
