"""An archive with the layout of the asset `evaluation`; every text in it is made up."""

import hashlib
import io
import json
import tarfile
from pathlib import Path

import pytest

from cutlayer.data.assets import ASSETS, Asset
from cutlayer.data.download import Release

__all__ = ["made_up_archive", "pin"]

_ROOT = "bigbench-1.0.0/bigbench/benchmark_tasks"
_NUM_STORIES = 12


def made_up_archive(path: Path) -> Path:
    """Twelve stories, articles and paragraphs; some of the articles appear twice."""
    with tarfile.open(path, "w:gz") as archive:
        for name, text in _files().items():
            info = tarfile.TarInfo(f"{_ROOT}/{name}")
            info.size = len(text.encode())
            archive.addfile(info, io.BytesIO(text.encode()))
    return path


def pin(archive: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Take the hashes of this archive for the asset's own while a test runs."""
    real = ASSETS["evaluation"]
    lines = "".join(
        f"{hashlib.sha256(text.encode()).hexdigest()}  {name}\n"
        for name, text in sorted(_files().items())
        if name in real.selection.files
    )
    release = Release(
        package="bigbench",
        version="1.0.0",
        sha256=hashlib.sha256(archive.read_bytes()).hexdigest(),
        is_source=True,
    )
    changed = {"release": release, "content_sha256": hashlib.sha256(lines.encode()).hexdigest()}
    monkeypatch.setitem(ASSETS, "evaluation", Asset(**{**vars(real), **changed}))


def _files() -> dict[str, str]:
    articles = [_text("article", number) for number in range(_NUM_STORIES)]
    gem = [
        {"input": text, "target": f"It is about {number}.", "comment": f"made-{number}"}
        for number, text in enumerate(articles)
    ]
    again = [articles[0].upper() + " More.", *(_text("more", number) for number in range(3))]
    return {
        "coqa_conversational_question_answering/coqa.test.json": json.dumps(
            {"version": "1.0", "data": [_story(number) for number in range(_NUM_STORIES)]}
        ),
        "factuality_of_summary/cnn_dm.json": _commented(articles),
        "factuality_of_summary/xsum.json": _commented(again),
        "gem/xsum/task.json": json.dumps({"examples": gem}),
        "natural_instructions/subtask058_multirc_question_answering/task.json": json.dumps(
            {"examples": [_multirc(number) for number in range(_NUM_STORIES)]}
        ),
        "gem/other/task.json": "{}",
    }


def _text(what: str, number: int) -> str:
    return " ".join(f"{what}{number}word{place}" for place in range(20))


def _story(number: int) -> dict[str, object]:
    def given(text: str) -> list[dict[str, object]]:
        return [{"input_text": f"{text} {turn}", "turn_id": turn} for turn in (1, 2)]

    return {
        "source": "made-up",
        "id": f"story-{number}",
        "filename": "none",
        "story": _text("story", number // 2),
        "questions": given(f"what is {number}"),
        "answers": given("one"),
        "additional_answers": {"0": given("two")},
        "name": "none",
    }


def _commented(articles: list[str]) -> str:
    lines = [
        {"source": text, "true_cnd": f"Short {number}.\nLine.", "idx": f"f{number}"}
        for number, text in enumerate(articles)
    ]
    return "# comment\n# more\n" + "".join(json.dumps(line) + "\n" for line in lines)


def _multirc(number: int) -> dict[str, object]:
    paragraph = f"Sent 1: {_text('paragraph', number // 2)}.Sent 2: It ends."
    options = "(A) red (B) green, or (C) it." if number else "(A) alone."
    return {
        "input": f"Paragraph- {paragraph} \nQuestion: What is {number}? {options}",
        "target": ["A, C." if number else "A."],
    }
