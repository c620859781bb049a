"""Whole audits of a tiny model: the real client, server and path, and a real attack."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from cutlayer.audit.attack import ATTACKS, Aim
from cutlayer.audit.audit import TRIED_FILE, Audit
from cutlayer.audit.results import Trial
from cutlayer.audit.settings import AuditPlan, AuditSettings
from cutlayer.audit.verdict import find_verdict, verdict_key
from cutlayer.client.settings import ClientSettings
from cutlayer.errors import ConfigError, CutlayerError, DataError, StorageError
from cutlayer.settings import load_settings, parse_settings
from cutlayer.simulation.settings_text import settings_text
from tests.tiny_models import tiny_model
from tests.worlds import client_of, client_settings, running_server, server_settings, write_rows

PUBLIC = "the cat sat on the mat\nand the dog did not\n" * 8
ATTACK = "vocabulary_matching"

pytestmark = pytest.mark.skipif(ATTACK not in ATTACKS.names, reason="the attack is not there yet")


class Watcher:
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.begun: list[str] = []
        self.finished: list[tuple[Trial, bool]] = []
        self.shares: list[float] = []

    def begin(self, number: int, total: int | None, label: str) -> None:
        self.begun.append(label)

    def progress(self, what: str, share: float) -> None:
        self.shares.append(share)

    def finish(self, trial: Trial, was_done: bool) -> None:
        self.finished.append((trial, was_done))


class World:
    """Settings files of one owner, and audits of them."""

    def __init__(self, folder: Path, model: Path) -> None:
        self.folder, self.model = folder, model
        (folder / "public.txt").write_text(PUBLIC)
        self.client = client_settings(model, folder, data__validation_fraction=0.3)
        self.write_client()
        self.watcher = Watcher()

    def write_client(self) -> None:
        (self.folder / "client.toml").write_text(settings_text(self.client))

    def plan(self, **changes: object) -> AuditPlan:
        table = {
            "client": str(self.folder / "client.toml"),
            "folder": str(self.folder / "audit"),
            "verdicts": str(self.folder / "verdicts"),
            "attacks": [ATTACK],
            "public": str(self.folder / "public.txt"),
            "rows": 5,
            "min_tokens": 30,
            "canaries": 1,
            "utility_rows": 0,
            "seconds_per_setting": 6,
            **changes,
        }
        return parse_settings(AuditSettings, {"audit": table}, "test").audit

    def audit(self, **changes: object) -> Audit:
        self.watcher = Watcher()
        return Audit(self.plan(**changes), self.watcher)


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path, tiny_model("llama", tmp_path)[0])


def result_of(trial: Trial) -> float:
    assert trial.recovery is not None
    return trial.recovery


def test_an_audit_finds_that_no_noise_leaks_all_and_much_noise_little(world: World) -> None:
    outcome = world.audit(rules=["none", "gaussian scale=5"], utility_rows=4).run()
    clean, noisy = outcome.trials
    assert result_of(clean) > 0.95
    assert result_of(noisy) < 0.5
    (result,) = clean.attacks
    assert result.canaries is not None
    assert result.canaries.value == 1.0
    assert result.chance is not None
    assert result.chance < 0.6
    assert clean.utility is not None
    assert clean.utility.accuracy is not None
    assert clean.utility.num_rows == 4
    assert clean.guarantee == "no noise: none"
    assert all(path.exists() for path in outcome.files)


def test_an_audit_started_again_repeats_nothing_and_may_grow(world: World) -> None:
    first = world.audit(rules=["none"]).run()
    again = world.audit(rules=["none", "gaussian scale=0.02"]).run()
    assert again.trials[0] == first.trials[0]
    assert [was_done for _, was_done in world.watcher.finished] == [True, False]
    assert len(world.watcher.begun) == 1


def test_nothing_private_is_in_the_report_unless_it_is_asked_for(world: World) -> None:
    world.audit(rules=["none"]).run()
    secret = "abababab"
    for path in (world.folder / "audit").iterdir():
        assert secret.encode() not in path.read_bytes(), path.name
    world.audit(rules=["none"], show_examples=True, folder=str(world.folder / "shown")).run()
    assert secret in (world.folder / "shown" / "report.html").read_text()


def test_train_finds_the_verdict_of_its_own_setting_and_of_no_other(world: World) -> None:
    world.audit().run()
    folder = world.folder / "verdicts"
    server = server_settings(world.model, world.folder)
    other = client_settings(world.model, world.folder, privacy__withhold="private")
    with running_server(server) as running:
        for settings, is_known in ((world.client, True), (other, False)):
            with client_of(running, settings) as client:
                leaves = {**client.head.leaves, **client.tail.leaves}
                found = find_verdict(verdict_key(settings, leaves), folder)
            assert bool(found) is is_known


def test_withheld_vectors_leave_less_to_find_and_the_rest_is_scored(world: World) -> None:
    lines = [{"text": "ab" * (1 + n % 5) + "xy"[n % 2], "answer": "pq"[n % 2]} for n in range(24)]
    rows = world.folder / "answers.jsonl"
    rows.write_text("".join(json.dumps(line) + "\n" for line in lines))
    world.client = client_settings(
        world.model,
        world.folder,
        data__train=str(rows),
        data__completion_template="{answer}",
        data__append_eos=False,
        data__validation_fraction=0.3,
    )
    world.write_client()
    held = ["none", "private keep_share=0.4", "private"]
    outcome = world.audit(withhold=held, utility_rows=4).run()
    whole, some, nothing = map(result_of, outcome.trials)
    assert whole > 0.95
    assert 0 < some < 0.6
    assert nothing < some
    for trial in outcome.trials:
        assert trial.utility is not None
        assert trial.utility.accuracy is not None


def test_rows_that_leave_twice_are_scored_once(world: World) -> None:
    (once,) = world.audit(rules=["none"]).run().trials
    (twice,) = world.audit(rules=["none"], passes=2, folder=str(world.folder / "b")).run().trials
    assert (twice.num_rows, twice.num_tokens) == (once.num_rows, once.num_tokens)
    assert twice.attacks[0].recovery == once.attacks[0].recovery


def test_knowing_the_trained_adapters_helps_the_attacker(world: World) -> None:
    shared = {"phases": ["trained"], "train_steps": 8, "rules": ["none"]}
    (t1,) = world.audit(**shared).run().trials
    (t2,) = world.audit(**shared, threat="T2", folder=str(world.folder / "b")).run().trials
    assert (t1.threat, t2.threat) == ("T1", "T2")
    assert result_of(t2) > 0.95
    assert result_of(t2) > result_of(t1)


def test_a_search_keeps_a_record_of_every_setting(world: World) -> None:
    audit = world.audit(
        rules=["gaussian scale=0.5"],
        utility_rows=2,
        search={"max_trials": 3, "halvings": 1, "max_scale_factor": 4},
    )
    answer = audit.search(0.01).answer
    assert answer is not None
    lines = (world.folder / "audit" / TRIED_FILE).read_text().splitlines()
    assert len(lines) == len(answer.tried) == 3
    assert "recovery" in lines[0]
    assert "utility" in lines[0]


def empty_data(world: World) -> None:
    (world.folder / "rows.jsonl").write_text("")


def no_data(world: World) -> None:
    world.client = world.client.model_copy(update={"data": None})
    world.write_client()


def no_client(world: World) -> None:
    (world.folder / "client.toml").unlink()


def other_rows(world: World) -> None:
    world.audit(rules=["none"])
    write_rows(world.folder / "rows.jsonl", 30)


def nothing(world: World) -> None:
    pass


@pytest.mark.parametrize(
    ("spoil", "changes", "kind", "complaint"),
    [
        (empty_data, {}, DataError, "rows.jsonl"),
        (no_data, {}, ConfigError, r"no \[data\] section"),
        (no_client, {}, ConfigError, "client.toml"),
        (other_rows, {"rules": ["none"]}, StorageError, "another model, data"),
        (nothing, {"attacks": ["telepathy"]}, ConfigError, "'telepathy' is unknown"),
        (nothing, {"cuts": [[1, 9]]}, ConfigError, "4 blocks"),
        (nothing, {"rules": ["gausian scale=1"]}, ConfigError, "'gausian' is unknown"),
        (nothing, {"public": "asset:nothing"}, ConfigError, "no such asset"),
        (nothing, {"public": "missing.txt"}, StorageError, "missing.txt"),
    ],
)
def test_what_cannot_be_audited_is_refused_before_anything_runs(
    world: World,
    spoil: Callable[[World], None],
    changes: dict[str, object],
    kind: type[CutlayerError],
    complaint: str,
) -> None:
    spoil(world)
    with pytest.raises(kind, match=complaint):
        world.audit(**changes)
    assert not world.watcher.begun


def test_an_attack_that_cannot_run_is_named_with_its_reason(world: World) -> None:
    if "noise_aware_inverter" not in ATTACKS.names:
        pytest.skip("the attack is not there yet")
    (trial,) = world.audit(attacks=["noise_aware_inverter"], public=None).run().trials
    (result,) = trial.attacks
    assert result.recovery is None
    assert result.skipped


def test_a_phase_without_a_length_is_refused(world: World) -> None:
    world.client = world.client.model_copy(update={"train": None})
    world.write_client()
    world.audit(rules=["none"]).run()
    with pytest.raises(ConfigError, match="train_steps"):
        world.audit(phases=["trained"], rules=["none"]).run()


def test_the_audit_leaves_the_owners_run_folder_alone(world: World) -> None:
    world.audit(rules=["none"]).run()
    assert not (world.folder / "run").exists()


def test_the_clients_settings_are_read_back_as_they_were_written(world: World) -> None:
    back = load_settings(ClientSettings, world.folder / "client.toml")
    assert back.model == world.client.model


def test_a_clipped_rule_has_an_epsilon_with_its_unit_and_an_unclipped_one_none(
    world: World,
) -> None:
    rules = ["clipped_gaussian scale=20 clip=5", "gaussian scale=0.5"]
    clipped, unclipped = world.audit(rules=rules).run().trials
    assert clipped.epsilon.startswith("epsilon ")
    assert "per row" in clipped.epsilon
    assert unclipped.epsilon == "no guarantee (unclipped)"


def test_canaries_of_a_fine_tune_are_planted_attacked_and_scored_with_chance(world: World) -> None:
    changes = {"attacks": ["canary_extraction"], "phases": ["base", "trained"], "canaries": 2}
    outcome = world.audit(rules=["none"], train_steps=2, **changes).run()
    (base,), (trained,) = (trial.attacks for trial in outcome.trials)
    assert "planted in a fine-tune" in (base.skipped or "")
    assert trained.aim is Aim.CANARIES
    assert trained.recovery is not None
    assert trained.recovery.num == 2 * 12, "digits count, spaces are form"
    assert trained.chance is not None
    assert trained.canaries is not None
    assert trained.canaries.num == 2
    assert outcome.trials[1].worst is None, "what a model kept is not what left"


def test_a_canary_learnt_by_heart_is_found(world: World) -> None:
    world.client = client_settings(
        world.model,
        world.folder,
        data__train=str(write_rows(world.folder / "few.jsonl", 2)),
        train__lr=0.02,
        train__rows_per_step=3,
    )
    world.write_client()
    changes = {"attacks": ["canary_extraction"], "phases": ["trained"], "threat": "T2"}
    (trial,) = world.audit(rules=["none"], train_steps=70, canaries=1, **changes).run().trials
    (result,) = trial.attacks
    assert result.recovery is not None
    assert result.chance is not None
    assert result.recovery.value > result.chance + 3 * (result.chance_error or 0.0)


def test_where_vectors_stay_no_canary_is_planted(world: World) -> None:
    rows = world.folder / "answers.jsonl"
    rows.write_text(json.dumps({"text": "abab", "answer": "a"}) + "\n")
    world.client = client_settings(
        world.model,
        world.folder,
        data__train=str(rows),
        data__completion_template="{answer}",
        data__append_eos=False,
    )
    world.write_client()
    changes = {"attacks": ["canary_extraction"], "phases": ["trained"], "train_steps": 1}
    (trial,) = world.audit(rules=["none"], withhold=["private"], **changes).run().trials
    assert "nothing withheld" in (trial.attacks[0].skipped or "")
