"""Text metrics: SQuAD's normalisation, best reference, ROUGE-L as its package computes it."""

import builtins
from collections.abc import Sequence

import pytest
from rouge_score.rouge_scorer import RougeScorer

from cutlayer.errors import ConfigError, DataError
from cutlayer.evaluation.text_metrics import METRICS, normalised

REPLIES = ["", "The Eiffel Tower!", "in a  tower, in Paris", "Paris", "paris. PARIS paris"]


def score(name: str, reply: str, *references: str) -> float:
    return METRICS.make(name)(reply, references)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The  Eiffel\tTower!", "eiffel tower"),
        ("an apple, a pear & the rest", "apple pear rest"),
        ("Theatre and anthem", "theatre and anthem"),
        ("U.S.A.'s", "usas"),
        ("a.", ""),
        ("", ""),
        ("ÉCOLE", "école"),
    ],
)
def test_texts_are_compared_without_case_articles_punctuation_and_spaces(
    text: str, expected: str
) -> None:
    assert normalised(text) == expected


@pytest.mark.parametrize(
    ("reply", "references", "expected"),
    [
        ("the Eiffel tower.", ["Louvre", "Eiffel Tower"], 1.0),
        ("Eiffel", ["Eiffel Tower"], 0.0),
        ("", ["x"], 0.0),
        ("the", [""], 1.0),
    ],
)
def test_exact_match_is_with_any_reference(
    reply: str, references: Sequence[str], expected: float
) -> None:
    assert score("exact_match", reply, *references) == expected


@pytest.mark.parametrize(
    ("reply", "references", "expected"),
    [
        ("the cat sat", ["a cat sat down"], 2 * 1 * (2 / 3) / (1 + 2 / 3)),
        ("cat", ["dog", "cat"], 1.0),
        ("cat cat", ["cat"], 2 * 0.5 * 1 / 1.5),
        ("cat", ["dog"], 0.0),
        ("", ["dog"], 0.0),
        ("the", ["an"], 1.0),
    ],
)
def test_f1_counts_words_with_repetition(
    reply: str, references: Sequence[str], expected: float
) -> None:
    assert score("f1", reply, *references) == pytest.approx(expected)


@pytest.mark.parametrize("reply", REPLIES)
@pytest.mark.parametrize(
    ("name", "kind"), [("rouge_1", "rouge1"), ("rouge_2", "rouge2"), ("rouge_l", "rougeL")]
)
def test_rouge_is_the_packages_own_best_f_measure(reply: str, name: str, kind: str) -> None:
    references = ["in the Eiffel tower in Paris", "Paris"]
    scorer = RougeScorer([kind], use_stemmer=False)
    expected = max(scorer.score(reference, reply)[kind].fmeasure for reference in references)
    assert score(name, reply, *references) == expected


@pytest.mark.parametrize("name", METRICS.names)
@pytest.mark.parametrize("reply", REPLIES)
def test_every_metric_is_between_0_and_1_and_the_best_reference_counts(
    name: str, reply: str
) -> None:
    one, other = score(name, reply, "the Eiffel tower"), score(name, reply, "Paris")
    assert 0 <= one <= 1
    assert score(name, reply, "the Eiffel tower", "Paris") == max(one, other)
    assert score(name, "Eiffel tower", "Eiffel tower") == 1.0


def test_an_unknown_metric_names_the_nearest() -> None:
    with pytest.raises(DataError, match=r"'rouge-l' is unknown; did you mean rouge_l\?.*exact_m"):
        METRICS.make("rouge-l")


def test_without_the_package_rouge_l_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = builtins.__import__

    def refusing(name: str, *rest: object) -> object:
        if name.startswith("rouge_score"):
            raise ImportError(name)
        return plain(name, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(builtins, "__import__", refusing)
    assert METRICS.require("rouge_l") == "rouge_l"
    with pytest.raises(ConfigError, match=r"rouge-score; install it: pip install .*evaluation"):
        METRICS.make("rouge_l")
