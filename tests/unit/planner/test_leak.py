import json
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest

from cutlayer.audit.grid import Rule, TrialSpec
from cutlayer.audit.report import About, write_report
from cutlayer.audit.results import Store, Trial
from cutlayer.audit.settings import Phase
from cutlayer.errors import StorageError
from cutlayer.model.partition import Cut
from cutlayer.planner.leak import LeakTable, read_leaks, rule_of
from cutlayer.planner.leak_files import LeakRule, Measured
from cutlayer.privacy.mechanism import NoiseSettings
from tests.unit.audit.made_trials import attack_result, grid_of_trials, trial_of

NONE = LeakRule(mechanism="none")
LABELS = [
    Rule(mechanism="none"),
    Rule(mechanism="clipped_gaussian", scale=0.1234567, clip=30.0),
    Rule(mechanism="gaussian", scale=2e-05),
]


def _write(path: Path, content: object) -> Path:
    path.write_bytes(msgspec.json.encode(content))
    return path


def _measured(cut: tuple[int, int], recovery: float = 0.5, rule: LeakRule = NONE) -> Measured:
    return Measured(
        cut=Cut(*cut),
        rule=rule,
        recovery=recovery,
        attack="vocabulary_matching",
        num_rows=24,
        num_tokens=412,
        labels=None,
        threat="T1",
        phase="base",
        source="made",
    )


def test_what_an_audit_keeps_is_read_as_the_audit_judged_it(tmp_path: Path) -> None:
    trials = grid_of_trials()
    store = Store(tmp_path / "audit", "of tests")
    for trial in trials:
        store.save(trial)
    table = read_leaks([tmp_path / "audit"])
    assert len(table.measured) == len(trials)
    for trial in trials:
        own = trial.spec.rule
        rule = LeakRule(mechanism=own.mechanism, scale=own.scale, clip=own.clip)
        leak = table.leak_at(trial.spec.cut, rule)
        assert leak is not None
        assert leak.is_exact
        assert leak.recovery == trial.recovery
        assert leak.attack == "vocabulary_matching"
        assert leak.measured.num_rows == trial.num_rows
        assert leak.measured.labels == 0.9


def test_a_report_and_a_printed_result_say_the_same(tmp_path: Path) -> None:
    trials = [trial_of(0.7), trial_of(0.3, 0.1)]
    folder = tmp_path / "report"
    folder.mkdir()
    write_report(trials, About(title="tiny", made="today", min_tokens=1), folder)
    # `Output` prints one line; what came before it on stdout may be kept in the same file.
    printed = tmp_path / "printed.json"
    values = {"trials": msgspec.to_builtins(trials), "files": []}
    printed.write_text("report: somewhere\n" + json.dumps(values) + "\n")
    by_report, by_print = read_leaks([folder]), read_leaks([printed])
    plain = [replace(one, source="") for one in by_report.measured]
    assert plain == [replace(one, source="") for one in by_print.measured]
    assert [one.recovery for one in plain] == [0.7, 0.3]


@pytest.mark.parametrize("rule", LABELS)
@pytest.mark.parametrize("withhold", ["none", "private", "private keep_share=0.055"])
def test_settings_in_words_are_read_as_the_audit_writes_them(
    tmp_path: Path, rule: Rule, withhold: str
) -> None:
    spec = TrialSpec(lower=0, upper=29, rule=rule, withhold=withhold, phase=Phase.TRAINED)
    shares = {"tag": 0.1, "vocabulary_matching": 0.4, "language_prior": 0.9}
    rows = [{"label": spec.label, "by_attack": shares}]
    path = _write(tmp_path / "pareto.json", {"settings": rows})
    noise = NoiseSettings(
        mechanism=rule.mechanism,
        scale=rule.scale,
        clip=rule.clip,
        withhold=withhold.split()[0],  # type: ignore[arg-type]
        keep_share=0.055 if "keep" in withhold else 0.0,
    )
    leak = read_leaks([path]).leak_at(Cut(0, 29), rule_of(noise))
    assert leak is not None
    assert (leak.recovery, leak.attack) == (0.4, "vocabulary_matching")
    assert leak.measured.phase == "trained"


def test_the_benchmarks_kept_result_is_read() -> None:
    kept = Path(__file__).parents[3] / "benchmarks" / "results" / "pareto-two-cores.json"
    leak = read_leaks([kept]).leak_at(Cut(0, 29), NONE)
    assert leak is not None
    assert leak.recovery == 1.0


def test_the_worst_of_several_audits_of_one_setting_counts() -> None:
    table = LeakTable([_measured((2, 28), 0.2), _measured((2, 28), 0.6), _measured((2, 28), 0.4)])
    leak = table.leak_at(Cut(2, 28), NONE)
    assert leak is not None
    assert leak.recovery == 0.6


def test_a_neighbouring_cut_says_where_it_was_measured() -> None:
    table = LeakTable([_measured((3, 28)), _measured((9, 28), 0.1)])
    leak = table.leak_at(Cut(2, 27), NONE)
    assert leak is not None
    assert not leak.is_exact
    assert leak.text == "~50 %"
    assert "measured at 3:28" in leak.note
    assert "may leak more" in leak.note
    shallower = table.leak_at(Cut(4, 28), NONE)
    assert shallower is not None
    assert shallower.note == "measured at 3:28"


def test_the_exact_cut_beats_a_worse_neighbour() -> None:
    table = LeakTable([_measured((1, 28), 0.9), _measured((2, 28), 0.1)])
    leak = table.leak_at(Cut(2, 28), NONE)
    assert leak is not None
    assert (leak.recovery, leak.note, leak.text) == (0.1, "", "10 %")


def test_of_two_neighbours_as_near_the_one_that_leaks_more_speaks() -> None:
    table = LeakTable([_measured((4, 28), 0.3), _measured((2, 28), 0.8)])
    leak = table.leak_at(Cut(3, 28), NONE)
    assert leak is not None
    assert leak.measured.cut == Cut(2, 28)


def test_nothing_is_said_of_far_cuts_and_of_other_rules() -> None:
    noisy = LeakRule(mechanism="gaussian", scale=0.02)
    table = LeakTable([_measured((2, 28)), _measured((5, 20), rule=noisy)])
    assert table.leak_at(Cut(5, 28), NONE) is None
    assert table.leak_at(Cut(2, 25), NONE) is None
    assert table.leak_at(Cut(2, 28), noisy) is None
    assert table.leak_at(Cut(5, 20), replace(noisy, scale=0.021)) is None
    assert table.leak_at(Cut(5, 20), replace(noisy, clip=1.0)) is None
    assert table.leak_at(Cut(5, 20), replace(noisy, withhold="private")) is None
    assert LeakTable().leak_at(Cut(2, 28), NONE) is None


def test_the_language_prior_and_attacks_on_labels_are_no_leak_of_tokens(tmp_path: Path) -> None:
    trial = trial_of(0.2)
    only = [one for one in trial.attacks if one.attack in ("language_prior", "label_inference")]
    path = _write(tmp_path / "trial-1.json", replace(trial, attacks=tuple(only)))
    with pytest.raises(StorageError, match="no setting there on which an attack on tokens ran"):
        read_leaks([path])


def test_no_paths_give_an_empty_table() -> None:
    assert read_leaks([]).measured == ()


def _wrong_share(trial: Trial) -> dict[str, object]:
    table: dict[str, object] = msgspec.to_builtins(trial)
    table["attacks"] = [msgspec.to_builtins(attack_result("tag", 1.7))]
    return table


def _wrong_cut(trial: Trial) -> Trial:
    return replace(trial, spec=replace(trial.spec, lower=9, upper=3))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "is not JSON"),
        (b"\xff\xfe", "is not JSON"),
        (b'{"trials": [', "is not JSON"),
        (b"[" * 100_000, "is not JSON"),
        (
            b'{"settings": [{"label": "cut 1:2, none, base", "by_attack": {"\\u001b[3m": 0.5}}]}',
            "is no result of an audit",
        ),
        (b"3", "holds no audit's results"),
        (b'{"runs": []}', "holds no audit's results"),
        (b"[]", "no setting there"),
        (b"[3]", "is no result of an audit"),
        (b'[{"spec": {}}]', "is no result of an audit"),
        (b'{"settings": [{"label": "x", "by_attack": {"tag": 0.5}}]}', "names no audited setting"),
        (
            b'{"settings": [{"label": "cut 1:2, gaussian scale=x, base", "by_attack": {"t": 0}}]}',
            "'x' is no number",
        ),
        (msgspec.json.encode([_wrong_share(trial_of(0.5))]), "is no result of an audit"),
        (msgspec.json.encode([_wrong_cut(trial_of(0.5))]), "the trunk needs at least one block"),
    ],
)
def test_a_wrong_file_is_named_with_what_is_wrong(
    tmp_path: Path, content: bytes, said: str
) -> None:
    path = tmp_path / "bad.json"
    path.write_bytes(content)
    with pytest.raises(StorageError, match=said) as caught:
        read_leaks([path])
    assert "bad.json" in str(caught.value)


def test_a_missing_file_and_an_empty_folder_are_named(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"nowhere\.json"):
        read_leaks([tmp_path / "nowhere.json"])
    with pytest.raises(StorageError, match="holds no audit"):
        read_leaks([tmp_path])
