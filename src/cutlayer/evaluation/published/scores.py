"""Official scores of the published tasks: predictions and questions in, `Scored` out.

It reads no file, runs no model and compares no runs. Each function follows the script that the
task's authors publish, down to how empty and several answers count; `benchmarks.official_scores`
runs those scripts beside it. Metrics are 0 to 1, where the tables print per cent.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from statistics import fmean

from cutlayer.errors import ConfigError, DataError
from cutlayer.evaluation.published.question import Prediction, Question, Scored
from cutlayer.evaluation.text_metrics import METRICS, TextMetric, normalised

__all__ = [
    "RIGHT_OPTION",
    "score_cb",
    "score_choices",
    "score_coqa",
    "score_multirc",
    "score_record",
    "score_rouge",
]

RIGHT_OPTION = "yes"
"""The choice that calls an option of MultiRC right; F1 is that of this class."""

_ROUGE_KINDS = {
    "rouge_1": "rouge1",
    "rouge_2": "rouge2",
    "rouge_l": "rougeL",
    "rouge_lsum": "rougeLsum",
}
"""Our names to those of the package rouge-score."""


def score_choices(questions: Sequence[Question], predictions: Sequence[Prediction]) -> Scored:
    """Share of choices that are right: `accuracy`, of each question too.

    Args:
        questions: with answers; any of them is right.
        predictions: one for each, in the same order; a text that is no choice is wrong.

    Raises:
        DataError: not one prediction for each question, none at all, or a question without answers.

    Source: Wang et al., SuperGLUE (arXiv 1905.00537), table 1: BoolQ, COPA, RTE, WiC, WSC.
    """
    _check(questions, predictions)
    return _means({"accuracy": _accuracies(questions, predictions)})


def score_coqa(questions: Sequence[Question], predictions: Sequence[Prediction]) -> Scored:
    """Overlap of words `f1` and exact match `em`, of each turn and their means.

    Where a turn has several answers, each is left out once, the best of the others counts, and the
    turn's value is the mean: so a reply is compared with as many answers as a human's was.

    Args:
        questions: one for each turn; `answers` as in the file, equal ones kept.
        predictions: one for each, in the same order.

    Raises:
        DataError: not one prediction for each question, none at all, or a question without answers.

    Source: Reddy et al., CoQA (arXiv 1808.07042), section 5.1; its `evaluate-v1.0.py`.
    """
    _check(questions, predictions)
    names = {"f1": "f1", "em": "exact_match"}
    return _means(
        {
            name: _each(questions, predictions, _leaving_one_out(METRICS.make(metric)))
            for name, metric in names.items()
        }
    )


def score_rouge(questions: Sequence[Question], predictions: Sequence[Prediction]) -> Scored:
    """F-measures `rouge_1`, `rouge_2`, `rouge_l`, `rouge_lsum`, of each summary and their means.

    Words are stemmed, as the published tables have it. `rouge_lsum` takes each line as a sentence
    (the R-L of CNN/DailyMail's tables); the others take the summary as one text. ROUGE-1.5.5 also
    looks irregular words up in a list, which rouge-score lacks: on packaged XSum and CNN/DailyMail
    the Perl script gives up to 0.4 points more (`benchmarks.official_scores`).

    Args:
        questions: with reference summaries; the best of several counts.
        predictions: one for each, in the same order.

    Raises:
        DataError: not one prediction for each question, none at all, or a question without answers.
        ConfigError: rouge-score is not installed.

    Source: Lin, ROUGE (2004), sections 2 and 3; the options `-n 2 -m` of ROUGE-1.5.5.
    """
    _check(questions, predictions)
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError as error:
        raise _missing("ROUGE", "rouge-score") from error
    scorer = RougeScorer(list(_ROUGE_KINDS.values()), use_stemmer=True)
    found = [
        scorer.score_multi(list(question.answers), prediction.text)
        for question, prediction in zip(questions, predictions, strict=True)
    ]
    return _means(
        {
            name: tuple(float(scores[kind].fmeasure) for scores in found)
            for name, kind in _ROUGE_KINDS.items()
        }
    )


def score_multirc(questions: Sequence[Question], predictions: Sequence[Prediction]) -> Scored:
    """`f1a` over all options, `em` over whole questions, and each option's `accuracy`.

    Args:
        questions: one for each option; those of one question share `group`.
        predictions: one for each, in the same order: `RIGHT_OPTION` or anything else.

    Raises:
        DataError: not one prediction for each question, none at all, or a question without answers.
        ConfigError: scikit-learn is not installed.

    Source: Khashabi et al., MultiRC (NAACL 2018), section 5; SuperGLUE (arXiv 1905.00537), table 1.
    """
    _check(questions, predictions)
    wanted = [RIGHT_OPTION in question.answers for question in questions]
    said = [prediction.text == RIGHT_OPTION for prediction in predictions]
    are_right = [want == say for want, say in zip(wanted, said, strict=True)]
    by_group: defaultdict[str, list[bool]] = defaultdict(list)
    for question, is_right in zip(questions, are_right, strict=True):
        by_group[question.group].append(is_right)
    scored = _means({"accuracy": tuple(map(float, are_right))})
    f1a = _f1_by_class(wanted, said, (True,))
    em = fmean(all(options) for options in by_group.values())
    return Scored(metrics={**scored.metrics, "f1a": f1a, "em": em}, items=scored.items)


def score_record(questions: Sequence[Question], predictions: Sequence[Prediction]) -> Scored:
    """Overlap of words `f1` and exact match `em` with the best answer, of each and their means.

    Args:
        questions: one for each query; `answers` are the entities that fill its gap.
        predictions: one for each, in the same order: the entity chosen.

    Raises:
        DataError: not one prediction for each question, none at all, or a question without answers.

    Source: Zhang et al., ReCoRD (arXiv 1810.12885), section 4; its script is that of SQuAD 1.1,
        whose F1 of two texts without words is 0.
    """
    _check(questions, predictions)
    overlap = METRICS.make("f1")

    def f1(reply: str, references: Sequence[str]) -> float:
        return overlap(reply, references) if normalised(reply) else 0.0

    metrics = {"f1": f1, "em": METRICS.make("exact_match")}
    return _means({name: _each(questions, predictions, it) for name, it in metrics.items()})


def score_cb(questions: Sequence[Question], predictions: Sequence[Prediction]) -> Scored:
    """`accuracy` and `f1`, the plain mean of the F1 of each class; `accuracy` of each question too.

    A class that is neither wanted nor said has F1 0 and counts, as in the authors' toolkit.

    Args:
        questions: their `choices` are the classes.
        predictions: one for each, in the same order.

    Raises:
        DataError: not one prediction for each question, none at all, or a question without answers.
        ConfigError: scikit-learn is not installed.

    Source: SuperGLUE (arXiv 1905.00537), section 3.1; jiant's `CommitmentTask`.
    """
    _check(questions, predictions)
    classes = sorted({choice for question in questions for choice in question.choices})
    wanted = [question.answers[0] for question in questions]
    said = [prediction.text for prediction in predictions]
    f1 = _f1_by_class(wanted, said, classes)
    scored = _means({"accuracy": _accuracies(questions, predictions)})
    return Scored(metrics={**scored.metrics, "f1": f1}, items=scored.items)


def _check(questions: Sequence[Question], predictions: Sequence[Prediction]) -> None:
    if len(questions) != len(predictions):
        raise DataError(
            f"{len(predictions)} predictions for {len(questions)} questions: there must be one for "
            "each, in the same order; predict again with the test file that the task wrote"
        )
    if not questions:
        raise DataError("no questions to score: the split or the file is empty; choose another")
    for number, question in enumerate(questions):
        if not question.answers:
            raise DataError(
                f"question {number} ({question.key}) has no answer to score against: published "
                "test splits keep them back; score the validation split"
            )


def _means(items: Mapping[str, tuple[float, ...]]) -> Scored:
    return Scored(metrics={name: fmean(values) for name, values in items.items()}, items=items)


def _each(
    questions: Sequence[Question], predictions: Sequence[Prediction], metric: TextMetric
) -> tuple[float, ...]:
    return tuple(
        metric(prediction.text, question.answers)
        for question, prediction in zip(questions, predictions, strict=True)
    )


def _accuracies(
    questions: Sequence[Question], predictions: Sequence[Prediction]
) -> tuple[float, ...]:
    return _each(questions, predictions, lambda text, answers: float(text in answers))


def _leaving_one_out(metric: TextMetric) -> TextMetric:
    """The mean over references of the metric against all but that one."""

    def score(reply: str, references: Sequence[str]) -> float:
        if len(references) == 1:
            return metric(reply, references)
        return fmean(
            metric(reply, [*references[:left_out], *references[left_out + 1 :]])
            for left_out in range(len(references))
        )

    return score


def _f1_by_class(
    wanted: Sequence[object], said: Sequence[object], classes: Iterable[object]
) -> float:
    """Mean over classes of each one's F1; 0 for a class that nobody wanted or said."""
    f1_score = _scikit_f1()
    return fmean(
        f1_score([want == it for want in wanted], [say == it for say in said]) for it in classes
    )


def _scikit_f1() -> Callable[[Sequence[bool], Sequence[bool]], float]:
    try:
        from sklearn.metrics import f1_score
    except ImportError as error:
        raise _missing("F1 over classes", "scikit-learn") from error
    return lambda wanted, said: float(f1_score(wanted, said, zero_division=0.0))


def _missing(what: str, package: str) -> ConfigError:
    return ConfigError(
        f'{what} needs the package {package}; install it: pip install "cutlayer[evaluation]"'
    )
