from dataclasses import replace
from pathlib import Path

import pytest

import cutlayer.audit.attacks
from cutlayer.audit.attack import Aim
from cutlayer.audit.results import Store
from cutlayer.audit.verdict import (
    NOT_AUDITED,
    Grade,
    find_verdict,
    grade_of,
    save_verdict,
    sentence,
    verdict_key,
    verdict_line,
)
from cutlayer.errors import StorageError
from tests.unit.audit.made_trials import trial_of
from tests.worlds import client_settings

assert cutlayer.audit.attacks


def test_a_trial_is_read_back_as_it_was_written(tmp_path: Path) -> None:
    store, trial = Store(tmp_path / "audit", "one"), trial_of(0.9, 0.02)
    assert store.load(trial.spec) is None
    store.save(trial)
    assert Store(tmp_path / "audit", "one").load(trial.spec) == trial


def test_settings_that_differ_in_any_digit_do_not_share_a_result(tmp_path: Path) -> None:
    store = Store(tmp_path / "audit", "one")
    store.save(trial_of(0.9, 0.02))
    assert store.load(trial_of(0.9, 0.020000001).spec) is None


def test_the_folder_of_another_audit_is_refused(tmp_path: Path) -> None:
    Store(tmp_path / "audit", "one")
    with pytest.raises(StorageError, match="another model, data set or attacker"):
        Store(tmp_path / "audit", "two")


def test_a_folder_with_other_files_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "audit"
    folder.mkdir(mode=0o700)
    (folder / "thesis.txt").write_text("mine")
    with pytest.raises(StorageError, match="holds no audit"):
        Store(folder, "one")


def test_a_damaged_trial_is_named_and_not_used(tmp_path: Path) -> None:
    store, trial = Store(tmp_path / "audit", "one"), trial_of(0.9)
    store.save(trial)
    path = next((tmp_path / "audit").glob("trial-*.json"))
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(StorageError, match=path.name):
        store.load(trial.spec)


def test_train_is_told_the_worst_of_what_is_known(tmp_path: Path) -> None:
    mild, bad = trial_of(0.2), replace(trial_of(0.97), threat="T2")
    for trial in (mild, bad):
        save_verdict(trial, tmp_path / "verdicts")
    line = verdict_line(find_verdict(mild.verdict_key, tmp_path / "verdicts"))
    assert "recovers 97 % of your private tokens" in line
    assert "trained adapters" in line


def test_a_setting_without_a_verdict_is_not_audited(tmp_path: Path) -> None:
    save_verdict(trial_of(0.2), tmp_path / "verdicts")
    assert verdict_line(find_verdict("another", tmp_path / "verdicts")) == NOT_AUDITED
    assert verdict_line(find_verdict("another", tmp_path / "missing")) == NOT_AUDITED


@pytest.mark.parametrize(
    ("recovery", "grade"),
    [
        (1.0, Grade.OPEN),
        (0.9, Grade.OPEN),
        (0.89, Grade.LEAKS),
        (0.3, Grade.PARTLY),
        (0.1, Grade.RESISTS),
        (None, Grade.UNKNOWN),
    ],
)
def test_grades_follow_the_share(recovery: float | None, grade: Grade) -> None:
    assert grade_of(recovery) is grade


def test_a_milder_audit_of_the_same_setting_takes_no_verdict_back(tmp_path: Path) -> None:
    save_verdict(trial_of(0.97), tmp_path)
    save_verdict(trial_of(0.02), tmp_path)
    save_verdict(replace(trial_of(0.5), attacks=()), tmp_path)
    (kept,) = find_verdict(trial_of(0.5).verdict_key, tmp_path)
    assert kept.recovery == 0.97
    save_verdict(trial_of(0.99), tmp_path)
    (kept,) = find_verdict(trial_of(0.5).verdict_key, tmp_path)
    assert kept.recovery == 0.99


def test_a_verdict_says_which_attacks_did_not_run_or_end_and_that_tokens_were_few() -> None:
    text = sentence(replace(trial_of(0.05), num_tokens=40))
    missing = text.partition("Not run: ")[2].partition(".")[0].split(", ")
    assert "learned_inverter" in missing, "skipped"
    assert "smashed_data_matching" in missing, "never asked for"
    assert not {"vocabulary_matching", "language_prior"} & set(missing)
    assert "Out of time: vocabulary_matching" in text
    assert "40 tokens are too few" in text
    assert "too few" not in sentence(trial_of(0.05))


def test_labels_are_said_where_no_attack_on_tokens_ran() -> None:
    trial = trial_of(0.5)
    labels = tuple(one for one in trial.attacks if one.aim is Aim.LABELS)
    assert "recovers 90 % of the answers" in sentence(replace(trial, attacks=labels))


def test_verdicts_of_a_share_kept_or_of_a_denoiser_are_of_that_setting_alone(
    tmp_path: Path,
) -> None:
    changes: list[dict[str, object]] = [
        {},
        {"privacy__withhold": "private"},
        {"privacy__withhold": "private", "privacy__keep_share": 0.1},
        {"privacy__withhold": "private", "privacy__keep_share": 0.3},
        {"privacy__denoiser": True},
    ]
    settings = [client_settings(tmp_path, tmp_path, **change) for change in changes]
    assert len({verdict_key(one, {}) for one in settings}) == len(changes)
