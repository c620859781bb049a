"""Scores of guesses against what was hidden."""

from collections.abc import Sequence

import pytest
from scipy.stats import binomtest

from cutlayer.audit.attack import Aim, Guess
from cutlayer.audit.scoring import Scorer
from cutlayer.audit.shares import share
from cutlayer.audit.truth import Hidden
from cutlayer.errors import DataError

WORDS = ["the", "a", "patient", "doctor", "fever", "Kirkwall", "storm"]


def text_of(tokens: Sequence[int]) -> str:
    return " ".join(WORDS[token] for token in tokens)


def said(number: int, tokens: Sequence[int], confidence: float = 1.0, **counts: int) -> Guess:
    confidences = (confidence,) * len(tokens)
    return Guess(number=number, tokens=tuple(tokens), confidences=confidences, **counts)


@pytest.mark.parametrize(("num_found", "num"), [(0, 1), (1, 1), (0, 300), (30, 300), (299, 300)])
def test_a_share_has_scipys_wilson_interval(num_found: int, num: int) -> None:
    wanted = binomtest(num_found, num).proportion_ci(method="wilson")
    got = share(num_found, num)
    assert (got.low, got.high) == pytest.approx((wanted.low, wanted.high), abs=1e-12)
    assert got.low <= got.value <= got.high


def test_only_private_tokens_count() -> None:
    hidden = {0: Hidden(tokens=(0, 2, 4, 5), private=(False, True, True, False))}
    right_on_the_template = said(0, [0, 3, 3, 5])
    assert Scorer().score(Aim.TOKENS, [right_on_the_template], hidden).recovery.value == 0
    half = Scorer().score(Aim.TOKENS, [said(0, [-1, 2, 3, -1])], hidden)
    assert (half.recovery.value, half.recovery.num, half.num_said) == (0.5, 2, 2)


def test_an_observation_without_a_guess_is_not_recovered() -> None:
    hidden = {0: Hidden(tokens=(1, 2)), 1: Hidden(tokens=(3, 4))}
    got = Scorer().score(Aim.TOKENS, [said(1, [3, 4])], hidden)
    assert (got.recovery.value, got.num_rows, got.num_said) == (0.5, 2, 2)


def test_a_row_that_left_often_counts_once_by_the_guess_that_is_trusted_most() -> None:
    hidden = {n: Hidden(tokens=(1, 2, 3), row_id="row7") for n in range(3)}
    guesses = [said(0, [1, 2, 3], 0.4), said(2, [1, 0, 0], 0.9)]
    got = Scorer().score(Aim.TOKENS, guesses, hidden)
    assert (got.recovery.num, got.num_rows) == (3, 1)
    assert got.recovery.value == pytest.approx(1 / 3), "not the better, the more trusted guess"


def test_chance_is_what_the_same_guesses_get_against_shuffled_targets() -> None:
    tokens = (1,) * 50 + (2,) * 50
    hidden = {0: Hidden(tokens=tokens)}
    got = Scorer().score(Aim.TOKENS, [said(0, tokens)], hidden)
    assert got.recovery.value == 1
    assert got.chance == pytest.approx(0.5, abs=0.03)
    assert got.chance_error == pytest.approx(0.05, abs=0.02)
    assert not got.is_chance
    always = Scorer().score(Aim.TOKENS, [said(0, [1] * 100)], hidden)
    assert (always.recovery.value, always.chance, always.is_chance) == (0.5, 0.5, True)


def test_the_same_guesses_give_the_same_numbers() -> None:
    hidden = {0: Hidden(tokens=tuple(range(7)))}
    guesses = [said(0, [0, 1, 2, 0, 0, 0, 0])]
    assert Scorer().score(Aim.TOKENS, guesses, hidden) == Scorer().score(
        Aim.TOKENS, guesses, hidden
    )


def test_labels_are_scored_where_they_are_private_and_set_against_the_majority() -> None:
    hidden = {
        0: Hidden(tokens=(1, 2, 5), labels=(-100, -100, 5)),
        1: Hidden(tokens=(1, 2, 5), labels=(-100, -100, 5)),
        2: Hidden(tokens=(1, 2, 6), labels=(1, 2, 6), private=(True, False, True)),
    }
    guesses = [said(n, [-1, -1, label]) for n, label in enumerate([5, 6, 6])]
    got = Scorer().score(Aim.LABELS, guesses, hidden)
    assert (got.recovery.num, got.recovery.value) == (3, pytest.approx(2 / 3))
    assert got.majority is not None
    assert got.majority.value == pytest.approx(2 / 3)


def test_rare_tokens_are_those_that_public_text_seldom_has() -> None:
    scorer = Scorer(public_rows=[[0, 0, 1, 1, 2], [0, 1, 3]], num_common=2)
    hidden = {0: Hidden(tokens=(0, 1, 5, 2))}
    got = scorer.score(Aim.TOKENS, [said(0, [0, 1, 5, 0])], hidden)
    assert got.rare is not None
    assert (got.rare.num, got.rare.value) == (2, 0.5)
    only_common = scorer.score(Aim.TOKENS, [said(0, [0])], {0: Hidden(tokens=(0,))})
    assert only_common.rare is None


def test_a_canary_counts_when_all_of_it_stands_in_its_place() -> None:
    scorer = Scorer(canaries=[(4, 5)])
    hidden = {0: Hidden(tokens=(1, 4, 5, 4, 5)), 1: Hidden(tokens=(1, 2))}
    got = scorer.score(Aim.TOKENS, [said(0, [0, 4, 5, 4, 0])], hidden)
    assert got.canaries is not None
    assert (got.canaries.num, got.canaries.value) == (2, 0.5)
    assert scorer.score(Aim.TOKENS, [], {1: hidden[1]}).canaries is None


def test_rouge_is_of_the_text_of_private_tokens() -> None:
    hidden = {0: Hidden(tokens=(0, 2, 4, 6), private=(False, True, True, True))}
    guesses = [said(0, [0, 2, -1, 6])]
    rouge = Scorer(text_of=text_of).score(Aim.TOKENS, guesses, hidden).rouge
    assert rouge is not None
    assert rouge.rouge_1 == pytest.approx(0.8), "2 of 2 words right, 2 of 3 found"
    assert rouge.rouge_2 == 0
    assert rouge.rouge_l == pytest.approx(0.8)


def test_a_bag_has_recall_and_precision_and_chance_from_public_text() -> None:
    hidden = {1: Hidden(tokens=(0, 1, 2, 3, 3), private=(False, True, True, True, True))}
    public = [list(range(100))]
    got = Scorer(public_rows=public).score(Aim.BAG, [said(1, [0, 1, 2, 50])], hidden)
    assert (got.recovery.num, got.recovery.value) == (3, pytest.approx(2 / 3))
    assert got.precision is not None
    assert got.precision.value == pytest.approx(2 / 3), "the template's token 0 is left out"
    assert got.chance == pytest.approx(0.04, abs=0.03)
    everything = Scorer(public_rows=public).score(Aim.BAG, [said(1, range(100))], hidden)
    assert everything.is_chance, "who names every token knows nothing"


def test_fallbacks_and_unfinished_positions_are_passed_through() -> None:
    hidden = {0: Hidden(tokens=(1,)), 1: Hidden(tokens=(1,))}
    guesses = [said(0, [1], num_fallbacks=2), said(1, [1], num_unfinished=3)]
    got = Scorer().score(Aim.TOKENS, guesses, hidden)
    assert (got.num_fallbacks, got.num_unfinished) == (2, 3)


@pytest.mark.parametrize("aim", list(Aim))
def test_a_recording_without_anything_private_is_an_error(aim: Aim) -> None:
    hidden = {0: Hidden(tokens=(1, 2), labels=(-100, 2), private=(False, False))}
    with pytest.raises(DataError, match="nothing to score"):
        Scorer().score(aim, [], hidden)
