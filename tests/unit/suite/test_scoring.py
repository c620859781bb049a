"""What a method gave becomes a result: official scores and digests, never a text."""

import hashlib

import msgspec
import pytest

from cutlayer.errors import ConfigError, CutlayerError, DataError
from cutlayer.evaluation.published.question import Prediction, Question
from cutlayer.suite.result import Figures, Origin, RunResult
from cutlayer.suite.scoring import main_score, scored
from cutlayer.suite.spec import Method, RunSpec, Sizes

SIZES = Sizes(train_rows=4, test_rows=4, steps=2, rows_per_step=2, micro_batch_rows=2, lr=1e-3)
ORIGIN = Origin(command="c", commit="unknown", versions={}, machine="m", began="2026-01-01")
PAIR = ("entailment", "not_entailment")


def _empty(task: str, method: Method = Method.SPLIT) -> RunResult:
    return RunResult(spec=RunSpec(task=task, method=method, seed=0, sizes=SIZES), origin=ORIGIN)


def _choices(*answers: int) -> list[Question]:
    return [
        Question(key=f"k{number}", choices=PAIR, answers=(PAIR[answer],))
        for number, answer in enumerate(answers)
    ]


def _chosen(place: int) -> Prediction:
    return Prediction(text=PAIR[place], log_likelihoods=(-1.0 - place, -2.0 + place))


def test_choices_have_official_scores_places_and_likelihoods() -> None:
    figures = Figures(predictions=[_chosen(0), _chosen(0)], losses=(2.0, 1.5), bytes_up=7)
    result = scored(_empty("rte"), figures, _choices(0, 1))
    assert result.metrics == {"accuracy": 0.5}
    assert result.items == {"accuracy": (1.0, 0.0)}
    assert result.chosen == (0, 0)
    assert result.log_likelihoods == ((-1.0, -2.0), (-1.0, -2.0))
    assert result.reply_digests == ()
    assert (result.losses, result.bytes_up) == ((2.0, 1.5), 7)
    assert main_score(result) == ("accuracy", 0.5)


def test_replies_are_kept_as_digests_alone() -> None:
    questions = [Question(key="a", group="a", answers=("a secret word",))]
    figures = Figures(predictions=[Prediction(text="a secret word")])
    result = scored(_empty("coqa"), figures, questions)
    assert result.reply_digests == (hashlib.sha256(b"a secret word").hexdigest(),)
    assert result.chosen == ()
    assert b"secret" not in msgspec.json.encode(result)
    assert main_score(result) == ("f1", 1.0)


def test_the_digest_of_questions_tells_orders_and_sets_apart() -> None:
    first = _choices(0, 1)
    digests = {
        scored(_empty("rte"), Figures(predictions=[]), questions).questions_digest
        for questions in (first, first[::-1], first[:1])
    }
    assert len(digests) == 3


def test_groups_of_questions_are_numbers_and_none_where_each_is_alone() -> None:
    def groups(*names: str) -> tuple[int, ...]:
        questions = [
            Question(key=f"k{number}", group=name, answers=("a",))
            for number, name in enumerate(names)
        ]
        figures = Figures(predictions=[Prediction(text="a")] * len(questions))
        return scored(_empty("coqa"), figures, questions).groups

    assert groups("x", "y", "x", "", "") == (0, 1, 0, 2, 3)
    assert groups("x", "y") == groups("", "") == ()


def test_an_audit_has_a_recovery_and_no_score() -> None:
    figures = Figures(predictions=[], recovery=0.25)
    result = scored(_empty("rte", Method.AUDIT), figures, _choices(0))
    assert (result.recovery, result.metrics) == (0.25, {})
    assert main_score(result) is None


@pytest.mark.parametrize(
    ("figures", "error", "words"),
    [
        (Figures(predictions=[_chosen(0)]), DataError, "1 predictions? for 2 questions"),
        (Figures(predictions=[_chosen(0), Prediction(text="x")]), DataError, "question k1"),
        (Figures(predictions=[], losses=(1.0, float("nan"))), ConfigError, "loss of step 2 is nan"),
        (
            Figures(predictions=[Prediction(text="x", log_likelihoods=(float("-inf"), 0.0))]),
            ConfigError,
            "test question 1 is not finite",
        ),
    ],
)
def test_what_cannot_be_scored_is_said(
    figures: Figures, error: type[CutlayerError], words: str
) -> None:
    with pytest.raises(error, match=words):
        scored(_empty("rte"), figures, _choices(0, 1))
