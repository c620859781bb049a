"""Our scores of the published tasks beside those of the official scripts, run as processes.

`--profile standard` fetches the packages that carry the scripts (about 370 MB, most of it the
archive with CoQA's gold file) and the asset `evaluation`, verifies them, and runs each script on
the small made-up rows whose numbers are recorded and on larger made-up ones. CoQA's also sees its
whole gold file, with the main answers as replies and with replies spoilt by a fixed rule; ROUGE and
MultiRC's see the packaged rows. `--profile smoke` compares with the recorded numbers and fetches
nothing. Run: `python -m benchmarks.official_scores --profile smoke`.

Expected: 0 but for the last bit of a float, and 2e-5 for ROUGE-1.5.5, which rounds to five digits.
Where words have irregular forms ROUGE differs: the Perl script looks them up in a list before it
stems, and NLTK's stemmer, which rouge-score uses, cuts words such as `flying` and `traditionally`
elsewhere.
"""

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from benchmarks.official_examples import (
    CB_CLASSES,
    COQA_REPLIES,
    RECORDED,
    SUMMARIES,
    choices,
    coqa_folder,
    examples,
    options,
    references,
    summaries,
)
from benchmarks.official_rows import cb_rows, lead, multirc_rows, record_rows, spoilt, summary_rows
from benchmarks.official_scripts import SCRIPTS, ask, ask_coqa, rouge_items, take_out
from benchmarks.report import emit, parse_arguments, print_table
from cutlayer.data.assets import fetch
from cutlayer.errors import DataError
from cutlayer.evaluation.published.catalogue import published_task
from cutlayer.evaluation.published.packaged import packaged_questions
from cutlayer.evaluation.published.question import Prediction, Question, Scored, Split
from cutlayer.evaluation.published.scores import (
    RIGHT_OPTION,
    score_cb,
    score_coqa,
    score_multirc,
    score_record,
    score_rouge,
)

__all__ = ["Comparison", "main"]

_SEED = 20261122
_ROWS = 2000
_SUMMARY_ROWS = 300
_SCORE = {
    "cb": score_cb,
    "coqa": score_coqa,
    "multirc": score_multirc,
    "record": score_record,
    "rouge": score_rouge,
}

Asked = tuple[Sequence[Question], Sequence[Prediction]]


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Both sides on one file of predictions."""

    task: str
    """Whose script."""
    rows: str
    """Which rows, in words."""
    num_rows: int
    """Questions, options or turns."""
    ours: Scored
    """From `published.scores`."""
    official: Scored
    """What the script gives, by the same names; fewer may be there."""

    @property
    def difference(self) -> float:
        """Largest absolute difference over the official metrics and the values of each question."""
        metrics = [
            abs(value - self.ours.metrics[name]) for name, value in self.official.metrics.items()
        ]
        items = [
            abs(theirs - mine)
            for name, values in self.official.items.items()
            for theirs, mine in zip(values, self.ours.items[name], strict=True)
        ]
        return max(metrics + items)


def main(arguments: Sequence[str] | None = None) -> dict[str, float | int | str]:
    """Compare, print, and return the largest difference of each comparison."""
    found = parse_arguments("our scores beside the official scripts'", arguments)
    with tempfile.TemporaryDirectory(prefix="cutlayer-official-") as name:
        compared = list(_recorded() if found.is_smoke else _measured(Path(name)))
    columns = ("task", "rows", "questions", "metric", "ours", "official", "largest difference")
    print_table(
        "our scores and the official scripts'",
        columns,
        [row for comparison in compared for row in _table_rows(comparison)],
    )
    result: dict[str, float | int | str] = {"profile": found.profile}
    for one in compared:
        result[f"{one.task}, {one.rows}"] = one.difference
    emit(result, found)
    return result


def _table_rows(one: Comparison) -> Iterator[tuple[str, str, int, str, float, float, str]]:
    for name, value in _with_means(one.official.metrics, one.official.items).metrics.items():
        ours = one.ours.metrics[name]
        yield one.task, one.rows, one.num_rows, name, ours, value, f"{one.difference:.2g}"


def _recorded() -> Iterator[Comparison]:
    """The small rows beside the numbers that the scripts gave for them."""
    for task, asked in examples().items():
        yield _compared(task, "recorded", asked, RECORDED[task])


def _measured(folder: Path) -> Iterator[Comparison]:
    """Every script run, on the small rows and on many."""
    for task in ("cb", "multirc", "record"):
        script = take_out(SCRIPTS[task], folder / task)
        for rows, asked in (("small", examples()[task]), ("made up", _many(task))):
            yield _compared(task, rows, asked, _official(task, script, asked))
        if task == "multirc":
            asked = _packaged_options()
            yield _compared(task, "packaged", asked, _official(task, script, asked))
    yield from _rouge(take_out(SCRIPTS["rouge"], folder / "rouge"))
    yield from _coqa(take_out(SCRIPTS["coqa"], folder / "coqa"), folder)


def _compared(task: str, rows: str, asked: Asked, official: Scored) -> Comparison:
    ours = _SCORE[task](*asked)
    return Comparison(task=task, rows=rows, num_rows=len(asked[0]), ours=ours, official=official)


def _many(task: str) -> Asked:
    if task == "cb":
        return choices(cb_rows(_ROWS, _SEED), CB_CLASSES)
    if task == "multirc":
        return options(multirc_rows(_ROWS, _SEED))
    return references(record_rows(_ROWS, _SEED))


def _official(task: str, script: Path, asked: Asked) -> Scored:
    """The script's numbers for choices and entities."""
    found = ask(task, script, [_as_given(task, *pair) for pair in zip(*asked, strict=True)])
    metrics = {name: value for name, value in found.items() if isinstance(value, float)}
    return _with_means(metrics, {n: value for n, value in found.items() if isinstance(value, list)})


def _as_given(task: str, question: Question, prediction: Prediction) -> Mapping[str, object]:
    if task == "cb":
        classes = CB_CLASSES.index
        return {"wanted": classes(question.answers[0]), "said": classes(prediction.text)}
    if task == "multirc":
        wanted, said = RIGHT_OPTION in question.answers, prediction.text == RIGHT_OPTION
        return {"group": question.group, "wanted": wanted, "said": said}
    return {"answers": question.answers, "text": prediction.text}


def _with_means(metrics: Mapping[str, float], items: Mapping[str, Sequence[float]]) -> Scored:
    means = {name: fmean(values) for name, values in items.items()}
    values = {name: tuple(values) for name, values in items.items()}
    return Scored(metrics={**metrics, **means}, items=values)


def _rouge(script: Path) -> Iterator[Comparison]:
    """Of one line the script's ROUGE-L is our `rouge_l`, of several our `rouge_lsum`."""
    regular = summary_rows(_SUMMARY_ROWS, _SEED, has_irregular_words=False)
    irregular = summary_rows(_SUMMARY_ROWS, _SEED, has_irregular_words=True)
    files = {"small": SUMMARIES, "made up": regular}
    for name, rows in files.items():
        yield _rouge_file(script, name, rows, has_irregular_words=True)
    files = {"irregular words": irregular}
    files |= {f"packaged {task}": _leads(task) for task in ("xsum", "cnn_dailymail")}
    for name, rows in files.items():
        yield _rouge_file(script, name, rows, has_irregular_words=True)
        unlisted = f"{name}, its list of them left out"
        yield _rouge_file(script, unlisted, rows, has_irregular_words=False)


def _rouge_file(
    script: Path, name: str, rows: Sequence[tuple[str, str]], *, has_irregular_words: bool
) -> Comparison:
    items = rouge_items(script, rows, has_irregular_words)
    return _compared("rouge", name, summaries(rows), _with_means({}, items))


def _leads(task: str) -> list[tuple[str, str]]:
    """References of the packaged rows, and the first sentences of their documents as replies."""
    return [
        (question.answers[0], lead(question.fields["document"])) for question in _packaged(task)
    ]


def _packaged_options() -> Asked:
    """The packaged options of MultiRC; every fifth is called what it is not."""
    questions = _packaged("multirc")
    replies = [
        question.choices[(question.choices.index(question.answers[0]) + (number % 5 == 0)) % 2]
        for number, question in enumerate(questions)
    ]
    return questions, _said(replies)


def _packaged(task: str) -> list[Question]:
    fetch("evaluation")
    return [question for questions in packaged_questions(task).values() for question in questions]


def _coqa(script: Path, folder: Path) -> Iterator[Comparison]:
    """The small gold file and the whole one, each with its main answers and with spoilt ones."""
    small = coqa_folder(folder / "small")
    for name, home in (("small", small), ("whole gold file", script.parent)):
        gold = next(home.glob("coqa.test.json"))
        questions = published_task("coqa").read_original(home, Split.TEST)
        main_answers = [question.answers[0] for question in questions]
        spoilt_answers = [
            spoilt(number, answer, main_answers[number - 1])
            for number, answer in enumerate(main_answers)
        ]
        files = {"gold answers": main_answers, "spoilt answers": spoilt_answers}
        if home is small:
            files["recorded replies"] = list(COQA_REPLIES)
        for kind, replies in files.items():
            yield from _coqa_file(script, gold, f"{name}, {kind}", (questions, _said(replies)))


def _coqa_file(script: Path, gold: Path, name: str, asked: Asked) -> Iterator[Comparison]:
    questions, predictions = asked
    keys = [(question.group, int(question.key.rsplit("/", 1)[1])) for question in questions]
    texts = [prediction.text for prediction in predictions]
    found = ask_coqa(script, gold, dict(zip(keys, texts, strict=True)))
    if found.answers != [list(question.answers) for question in questions]:
        raise DataError(f"{gold}: the loader's gold answers are not those of the script")
    official = _with_means({}, found.items)
    yield (one := _compared("coqa", name, asked, official))
    per_cent = {key: round(100 * one.ours.metrics[key], 1) for key in found.printed}
    yield Comparison(
        task="coqa",
        rows=f"{name}, printed",
        num_rows=len(questions),
        ours=Scored(metrics=per_cent, items={}),
        official=Scored(metrics=found.printed, items={}),
    )


def _said(replies: Sequence[str]) -> list[Prediction]:
    return [Prediction(text=reply) for reply in replies]


if __name__ == "__main__":
    main()
