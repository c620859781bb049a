"""Made-up gold answers and predictions, and what the official scripts printed for them.

It runs no script. All texts are our own; no row of a published corpus stands here.
`benchmarks.official_scores` in its standard profile runs the scripts again and compares.
"""

import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from cutlayer.evaluation.published.catalogue import published_task
from cutlayer.evaluation.published.question import Prediction, Question, Scored, Split

__all__ = [
    "CB",
    "CB_CLASSES",
    "COQA_GOLD",
    "COQA_REPLIES",
    "MULTIRC",
    "RECORD",
    "RECORDED",
    "SUMMARIES",
    "choices",
    "coqa_folder",
    "examples",
    "options",
    "references",
    "summaries",
]

Asked = tuple[list[Question], list[Prediction]]

_STORY = "Mira walked to the old mill with her dog Bolt. They found a red kite in the grass."
_POST = "I sold my bike on Monday and took the 8:15 bus."

COQA_GOLD: Mapping[str, object] = {
    "version": "1.0",
    "data": [
        {
            "source": "mctest",
            "id": "story-mill",
            "filename": "mill.txt",
            "story": _STORY,
            "questions": [
                {"turn_id": 1, "input_text": "Who walked?"},
                {"turn_id": 2, "input_text": "Where to?"},
                {"turn_id": 3, "input_text": "Did she find anything?"},
                {"turn_id": 4, "input_text": "What?"},
                {"turn_id": 5, "input_text": "Was it a plane?"},
                {"turn_id": 6, "input_text": "Which article is before old?"},
            ],
            "answers": [
                {"turn_id": 1, "input_text": "Mira and her dog Bolt"},
                {"turn_id": 2, "input_text": "to the old mill"},
                {"turn_id": 3, "input_text": "yes"},
                {"turn_id": 4, "input_text": "a red kite"},
                {"turn_id": 5, "input_text": "No."},
                {"turn_id": 6, "input_text": "the"},
            ],
            "additional_answers": {
                "0": [
                    {"turn_id": 1, "input_text": "Mira"},
                    {"turn_id": 2, "input_text": "The old mill."},
                    {"turn_id": 3, "input_text": "Yes"},
                    {"turn_id": 4, "input_text": "A kite"},
                    {"turn_id": 5, "input_text": "no"},
                    {"turn_id": 6, "input_text": "The"},
                ],
                "1": [
                    {"turn_id": 1, "input_text": "Mira, with Bolt"},
                    {"turn_id": 2, "input_text": "an old mill"},
                    {"turn_id": 3, "input_text": "a kite"},
                    {"turn_id": 4, "input_text": "a red, red kite"},
                    {"turn_id": 5, "input_text": "unknown"},
                    {"turn_id": 6, "input_text": "it is 'the'"},
                ],
            },
        },
        {
            "source": "reddit",
            "id": "post-bike",
            "filename": "bike.txt",
            "story": _POST,
            "questions": [
                {"turn_id": 1, "input_text": "What was sold?"},
                {"turn_id": 2, "input_text": "When?"},
                {"turn_id": 3, "input_text": "Which bus?"},
            ],
            "answers": [
                {"turn_id": 1, "input_text": "my bike"},
                {"turn_id": 2, "input_text": "on Monday"},
                {"turn_id": 3, "input_text": "the 8:15 bus"},
            ],
            "additional_answers": {},
        },
    ],
}
"""In the layout of CoQA's files: three annotators of one story, one of the other."""

COQA_REPLIES = (
    "mira and bolt",
    "Mill",
    "YES!",
    "red kite in the grass",
    "",
    "a",
    "my bike",
    "Tuesday",
    "bus at 8:15",
)
"""One for each turn of `COQA_GOLD`."""

CB_CLASSES = ("entailment", "contradiction", "neutral")
"""In the order of the official script."""

CB: Sequence[tuple[str, str]] = (
    ("entailment", "entailment"),
    ("entailment", "contradiction"),
    ("contradiction", "contradiction"),
    ("contradiction", "contradiction"),
    ("contradiction", "entailment"),
    ("contradiction", "contradiction"),
    ("entailment", "entailment"),
)
"""Wanted and said; nobody wants or says the third class."""

MULTIRC: Sequence[tuple[str, str, str]] = (
    ("0-0", "yes", "yes"),
    ("0-0", "no", "no"),
    ("0-0", "no", "no"),
    ("0-1", "yes", "no"),
    ("0-1", "yes", "yes"),
    ("0-2", "no", "yes"),
    ("1-0", "no", "no"),
    ("1-0", "no", "no"),
    ("1-1", "yes", "yes"),
    ("1-1", "no", "yes"),
    ("0-0", "yes", "yes"),
)
"""Question, wanted, said; the last option belongs to the first question."""

RECORD: Sequence[tuple[tuple[str, ...], str]] = (
    (("Harbour Board", "The Harbour Board"), "Harbour Board"),
    (("Ada Quill", "Quill"), "Ada"),
    (("Northfield United", "Northfield"), "Southfield United"),
    (("The The", "A"), "an"),
    (("U.S.", "United States"), "us"),
    (("Lake Orrin",), "Mount Orrin Lake"),
    (("Pell",), "Orrin"),
)
"""Entities that fill the gap, and the one chosen; one chosen has no word left without articles."""

SUMMARIES: Sequence[tuple[str, str]] = (
    (
        "The council closes two bridges.\nDrivers face long delays until spring.",
        "Two bridges closed by the council.\nSpring brings delays for drivers.",
    ),
    ("A baker won the prize for her rye bread.", "A baker won the prize for her rye bread."),
    ("Rain stopped the match after an hour.", "Nobody scored."),
    ("Prices of wheat rose by 4.5 percent.", ""),
    (
        "The train-line's owner, Mr O'Hara, is selling.\nUnions are striking.\nBuses run hourly.",
        "Unions strike as the owner sells the train line and the train line owner is silent.",
    ),
    ("one two three one two three", "three two one one two one one"),
)
"""Reference and reply, one sentence a line."""


def coqa_folder(folder: Path) -> Path:
    """`folder`, made and holding `COQA_GOLD` under the name that CoQA's loader looks for."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "coqa.test.json").write_text(json.dumps(COQA_GOLD), encoding="utf-8")
    return folder


def choices(rows: Sequence[tuple[str, str]], classes: Sequence[str]) -> Asked:
    """Questions and predictions of wanted and said classes."""
    return _asked([((wanted,), said) for wanted, said in rows], classes)


def options(rows: Sequence[tuple[str, str, str]]) -> Asked:
    """Questions and predictions of MultiRC's options."""
    questions, predictions = choices([(wanted, said) for _, wanted, said in rows], ("no", "yes"))
    grouped = [
        replace(question, group=group)
        for question, (group, _, _) in zip(questions, rows, strict=True)
    ]
    return grouped, predictions


def references(rows: Sequence[tuple[tuple[str, ...], str]]) -> Asked:
    """Questions and predictions of right texts and a reply."""
    return _asked(rows, ())


def summaries(rows: Sequence[tuple[str, str]]) -> Asked:
    """Questions and predictions of one reference and a reply."""
    return references([((reference,), reply) for reference, reply in rows])


def examples() -> dict[str, Asked]:
    """The small rows of each task in `RECORDED`."""
    return {
        "cb": choices(CB, CB_CLASSES),
        "coqa": references(list(zip(_coqa_answers(), COQA_REPLIES, strict=True))),
        "multirc": options(MULTIRC),
        "record": references(RECORD),
        "rouge": summaries(SUMMARIES),
    }


def _asked(rows: Sequence[tuple[tuple[str, ...], str]], classes: Sequence[str]) -> Asked:
    questions = [
        Question(key=str(number), choices=tuple(classes), answers=answers)
        for number, (answers, _) in enumerate(rows)
    ]
    return questions, [Prediction(text=reply) for _, reply in rows]


def _coqa_answers() -> list[tuple[str, ...]]:
    """Read by the loader that the product uses."""
    with tempfile.TemporaryDirectory(prefix="cutlayer-") as name:
        questions = published_task("coqa").read_original(coqa_folder(Path(name)), Split.TEST)
    return [question.answers for question in questions]


RECORDED: Mapping[str, Scored] = {
    "cb": Scored(metrics={"f1": 0.47222222222222215}, items={}),
    # The command printed f1 64.7 and em 33.3 per cent.
    "coqa": Scored(
        metrics={"f1": 0.647089947089947, "em": 0.3333333333333333},
        items={
            "f1": (
                *(0.7222222222222222, 0.6666666666666666, 1.0, 0.6349206349206349, 0.0, 1.0),
                *(1.0, 0.0, 0.8),
            ),
            "em": (0.0, 0.0, 1.0, 0.0, 0.0, 1.0, 1.0, 0.0, 0.0),
        },
    ),
    "multirc": Scored(metrics={"f1a": 0.7272727272727273, "em": 0.4}, items={}),
    "record": Scored(
        metrics={"f1": 0.5666666666666667, "em": 0.42857142857142855},
        items={
            "f1": (1.0, 0.6666666666666666, 0.5, 0.0, 1.0, 0.8, 0.0),
            "em": (1.0, 0.0, 0.0, 1.0, 1.0, 0.0, 0.0),
        },
    ),
    "rouge": Scored(
        metrics={},
        items={
            "rouge_1": (0.72727, 1.0, 0.0, 0.0, 0.5, 0.76923),
            "rouge_2": (0.2, 1.0, 0.0, 0.0, 0.13333, 0.18182),
            "rouge_l": (0.27273, 1.0, 0.0, 0.0, 0.3125, 0.46154),
            "rouge_lsum": (0.27273, 1.0, 0.0, 0.0, 0.4375, 0.46154),
        },
    ),
}
"""By task: what each of `official_scripts.SCRIPTS` (package, version and SHA-256 stand there)
returned on 2026-11-22 for `examples()`. ROUGE-1.5.5 prints five digits."""
