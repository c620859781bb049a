import re
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import msgspec
import pytest

from cutlayer.audit.plots import front, points
from cutlayer.audit.report import About, report_html, write_report
from cutlayer.audit.results import AttackResult, Example, Trial
from cutlayer.audit.verdict import sentence
from tests.unit.audit.made_trials import grid_of_trials, trial_of

ABOUT = About(title="tiny-llama, rows.jsonl", made="Today.", min_tokens=300)


@pytest.fixture(scope="module")
def page() -> str:
    return report_html(grid_of_trials(), ABOUT)


def test_the_page_needs_nothing_from_elsewhere(page: str) -> None:
    assert not re.findall(r"""(?:src|href)=["'](?!#)[^"']*["']""", page)
    assert "@import" not in page
    assert "<script" not in page
    assert not re.search(r"url\((?!#)", page)


def test_the_verdict_comes_first_and_in_plain_words(page: str) -> None:
    place = page.index("recovers 99 % of your private tokens")
    assert place < page.index("<svg")
    assert "an attacker who knows the public weights" in page


def test_every_setting_and_every_attack_is_shown(page: str) -> None:
    trials = grid_of_trials()
    assert all(trial.label in page for trial in trials)
    assert all(one.attack in page for one in trials[0].attacks)
    assert "no public text" in page


def test_pictures_take_the_pages_own_colour(page: str) -> None:
    assert page.count("<svg") == 2
    assert "#0a0b0c" not in page
    assert "currentColor" in page


def test_a_pages_text_cannot_become_markup() -> None:
    hostile = replace(trial_of(0.5), label="<script>alert(1)</script>")
    html = report_html([hostile], replace(ABOUT, title="<img src=x>"))
    assert "<script" not in html
    assert "<img" not in html


def test_examples_are_shown_where_the_trial_has_them_and_the_page_says_so() -> None:
    trial = trial_of(0.5)
    example = Example(truth="Ms Oduya", guess="Ms Odu")
    attacks = (replace(trial.attacks[0], examples=(example,)), *trial.attacks[1:])
    html = report_html([replace(trial, attacks=attacks)], ABOUT)
    assert "Ms Oduya" in html
    assert "holds private text" in html
    assert "holds no private text" in report_html([trial], ABOUT)


def test_too_few_tokens_and_unfinished_search_are_warned_of() -> None:
    html = report_html([replace(trial_of(0.5), num_tokens=12)], ABOUT)
    assert "Only 12 private tokens" in html
    assert "Time ran out for vocabulary_matching" in html


def test_a_trial_without_any_attack_says_that_nothing_is_known() -> None:
    nothing = replace(trial_of(0.5), attacks=(), utility=None)
    assert "nothing is known" in sentence(nothing)
    assert "nothing is known" in report_html([nothing], ABOUT)


def test_a_setting_without_any_attack_is_not_shown_as_the_safest() -> None:
    nothing = replace(trial_of(0.5), attacks=(), label="not attacked")
    trials = [trial_of(0.9), trial_of(0.5, 0.1), nothing, trial_of(0.3, 0.3)]
    verdicts = report_html(trials, ABOUT).partition("</style>")[2].partition("<svg")[0]
    assert "nothing is known" not in verdicts
    assert trials[-1].label in verdicts


def test_the_files_are_written_and_read_back(tmp_path: Path) -> None:
    trials = grid_of_trials()[:2]
    paths = write_report(trials, ABOUT, tmp_path)
    assert {path.name for path in paths} == {
        "report.html",
        "report.json",
        "recovery.png",
        "front.png",
    }
    assert (tmp_path / "front.png").read_bytes().startswith(b"\x89PNG")
    back = msgspec.json.decode((tmp_path / "report.json").read_bytes(), type=list[Trial])
    assert back == trials


def test_the_front_has_no_point_that_another_beats() -> None:
    best = front(points(grid_of_trials()))
    assert best
    for earlier, later in pairwise(best):
        assert earlier.recovery <= later.recovery
        assert earlier.utility < later.utility


def test_the_strongest_attack_is_one_that_looks_at_what_left() -> None:
    trial = trial_of(0.01)
    assert trial.worst is not None
    assert trial.worst.attack == "vocabulary_matching"
    assert trial.prior == 0.06
    prior_alone = replace(trial, attacks=(prior_of(trial),))
    assert prior_alone.worst is None


def prior_of(trial: Trial) -> AttackResult:
    return next(one for one in trial.attacks if one.attack == "language_prior")
