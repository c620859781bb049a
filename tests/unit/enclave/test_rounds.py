"""Several owners of one enclave: it averages inside, and hands out nothing but the average."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from cutlayer.enclave.few import PoolOfMany
from cutlayer.enclave.server import EnclaveServer
from cutlayer.enclave.settings import EnclaveSettings
from cutlayer.errors import ConfigError, ProtocolError, QuorumNotMet, StepExpired
from cutlayer.federation.rounds import trunk_contributions
from cutlayer.federation.rules import Rules
from cutlayer.federation.strategy import STRATEGIES
from cutlayer.federation.trunk_pool import TrunkUpdate, UpdateKind
from cutlayer.model.adapters import AdapterSettings
from tests.enclave_worlds import enclave_settings, owner_of, owner_settings, running_enclave
from tests.worlds import Table, write_rows

OWNERS = ("clinic-a", "clinic-b")
LOCAL_STEPS = 2
ADAPTER = {"rank": 4, "alpha": 8}


def _rounds(model: Path, folder: Path, **changes: object) -> EnclaveSettings:
    table: Table = {
        "name": "clinics",
        "rounds": 1,
        "local_steps": LOCAL_STEPS,
        "adapter": ADAPTER,
        "min_members": 2,
        "quorum": 2,
        "min_cohort": changes.get("quorum", 2),
        "gather_s": 0.0,
        "deadline_s": 60.0,
        **changes,
    }
    return enclave_settings(model, folder, rounds=table)


def _member(model: Path, folder: Path, num_rows: int, **changes: object) -> dict[str, object]:
    """Settings of one owner in rounds: no steps, for the enclave says how many."""
    folder.mkdir(exist_ok=True)
    rows = write_rows(folder / "own.jsonl", num_rows)
    train = {"rows_per_step": 8, "micro_batch_rows": 3, "lr": 0.02, "schedule": "constant"}
    shared = {"name": "clinics", "min_cohort": 2}
    return {"train": train, "rounds": shared, "data__train": str(rows), **changes}


def _trained_alone(model: Path, folder: Path, num_rows: int) -> tuple[dict[str, Tensor], int]:
    """The adapter after the same steps without others, and the scored tokens in them."""
    changes = _member(model, folder, num_rows)
    del changes["rounds"]
    changes["train"] = {**changes["train"], "steps": LOCAL_STEPS}  # type: ignore[dict-item]
    with (
        running_enclave(enclave_settings(model, folder)) as server,
        owner_of(server, owner_settings(model, folder, **changes)) as owner,
    ):
        history = owner.train().history
        owner.export(folder / "out")
    tokens = sum(record.num_scored for record in history)
    return load_file(folder / "out" / "adapter_model.safetensors"), tokens


def _train_together(
    server: EnclaveServer, model: Path, folder: Path, num_rows: dict[str, int]
) -> None:
    def take_part(name: str) -> None:
        settings = owner_settings(
            model, folder / name, **_member(model, folder / name, num_rows[name])
        )
        with owner_of(server, settings, name) as owner:
            owner.train()
            owner.export(folder / name / "out")

    with ThreadPoolExecutor(len(num_rows)) as pool:
        list(pool.map(take_part, num_rows))


def test_two_owners_get_the_average_by_tokens_of_what_each_would_have_learnt(
    tmp_path: Path,
    model: Path,
) -> None:
    num_rows = dict(zip(OWNERS, (24, 16), strict=True))
    alone = [_trained_alone(model, tmp_path / f"alone-{n}", n) for n in num_rows.values()]
    with running_enclave(_rounds(model, tmp_path)) as server:
        _train_together(server, model, tmp_path, num_rows)
    total = sum(tokens for _, tokens in alone)
    for name in OWNERS:
        got = load_file(tmp_path / name / "out" / "adapter_model.safetensors")
        assert got.keys() == alone[0][0].keys()
        for key, tensor in got.items():
            mean = sum(state[key].double() * tokens for state, tokens in alone) / total
            torch.testing.assert_close(tensor, mean.float(), rtol=1e-5, atol=1e-6)


def test_nobody_can_pull_the_adapter_of_an_open_round(tmp_path: Path, model: Path) -> None:
    with running_enclave(_rounds(model, tmp_path, quorum=1, min_members=1)) as server:
        changes = _member(model, tmp_path / "a", 16)
        changes["rounds"] = {"name": "clinics", "min_cohort": 1}
        with owner_of(server, owner_settings(model, tmp_path / "a", **changes)) as owner:
            seen = []

            def try_to_pull(report: object) -> None:
                for run_id in (owner.run_id, "clinics.r1.a1"):
                    with pytest.raises(StepExpired, match="has no run"):
                        owner.enclave.pull_adapter(run_id, 1)
                    seen.append(run_id)

            owner.train(try_to_pull)
            assert len(seen) == 2 * LOCAL_STEPS


@pytest.mark.parametrize("kind", sorted(set(STRATEGIES) - {"fedprox"}))
def test_every_strategy_averages_inside(tmp_path: Path, model: Path, kind: str) -> None:
    rounds = _rounds(model, tmp_path, min_members=1, quorum=1, strategy={"kind": kind})
    changes = _member(model, tmp_path / "a", 8)
    changes["rounds"] = {"name": "clinics", "min_cohort": 1}
    if kind == "fedavg_frozen_a":
        changes["adapter"] = {**ADAPTER, "train_a": False}
    with (
        running_enclave(rounds) as server,
        owner_of(server, owner_settings(model, tmp_path / "a", **changes)) as owner,
    ):
        assert owner.train().step == 1
        owner.export(tmp_path / "out")
    trained = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert any(bool(value.any()) for key, value in trained.items() if "lora_B" in key)


def test_fedprox_is_refused_with_the_reason(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="fedprox pulls at what trains at the owners"):
        _rounds(tmp_path, tmp_path, strategy={"kind": "fedprox"})


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"quorum": 3}, "quorum=3 exceeds min_members=2"),
        ({"strategy": {"kind": "svd"}, "adapter": {"kinds": ["prefix"]}}, "LoRA's factors"),
    ],
    ids=["quorum", "kind"],
)
def test_rounds_that_could_never_end_are_refused_when_they_are_read(
    tmp_path: Path, change: dict[str, object], reason: str
) -> None:
    with pytest.raises(ConfigError, match=reason):
        _rounds(tmp_path, tmp_path, **change)


def test_nobody_weighs_more_than_the_enclave_allows(tmp_path: Path, model: Path) -> None:
    claimed = 1000
    with running_enclave(_rounds(model, tmp_path, max_weight=7)) as server:
        assert server.federation is not None
        rules = Rules(server.federation.settings, {}, {"a": [1]})
        brought = {n: TrunkUpdate(state={"a": torch.ones(1)}, weight=claimed) for n in OWNERS}
        found = trunk_contributions(rules, {"a": torch.zeros(1)}, UpdateKind.DELTA, brought)
    assert [update.weight for update in found.updates] == [7, 7]


def test_rows_stay_inside_from_round_to_round(tmp_path: Path, model: Path) -> None:
    rounds = _rounds(model, tmp_path, rounds=3, min_members=1, quorum=1)
    changes = _member(model, tmp_path / "a", 16)
    changes["rounds"] = {"name": "clinics", "min_cohort": 1}
    with (
        running_enclave(rounds) as server,
        owner_of(server, owner_settings(model, tmp_path / "a", **changes)) as owner,
    ):
        assert owner.train().step == 3
        assert owner.feeder is not None
        assert owner.feeder.num_sent == 16


def test_a_round_without_its_quorum_is_no_round(tmp_path: Path, model: Path) -> None:
    rounds = _rounds(model, tmp_path, min_members=1, quorum=1, max_attempts=1, deadline_s=0.01)
    changes = _member(model, tmp_path / "a", 16)
    changes["rounds"] = {"name": "clinics", "min_cohort": 1}
    with (
        running_enclave(rounds) as server,
        owner_of(server, owner_settings(model, tmp_path / "a", **changes)) as owner,
        pytest.raises(QuorumNotMet, match="max_attempts"),
    ):
        owner.train()


def test_settings_by_which_an_average_could_be_of_too_few_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"quorum=2 is below rounds\.min_cohort=3"):
        _rounds(tmp_path, tmp_path, min_cohort=3)
    table: Table = {"name": "clinics", "rounds": 1, "min_members": 2, "quorum": 2}
    with pytest.raises(ConfigError, match=r"below rounds\.min_cohort=3"):
        enclave_settings(tmp_path, tmp_path, rounds=table)


class _Learnt:
    """A pool in which two of three owners trained; the third has handed in all the same."""

    def __init__(self, third: TrunkUpdate | None) -> None:
        trained = {name: TrunkUpdate(state={"a": torch.ones(1)}, weight=5) for name in OWNERS}
        self._found = trained if third is None else {**trained, "clinic-c": third}

    def layout(self, adapter: AdapterSettings) -> dict[str, list[int]]:
        return {"a": [1]}

    def begin_round(self, run_id: str, adapter: AdapterSettings, states: object) -> None:
        pass

    def collect(self, run_id: str, members: object, kind: UpdateKind) -> dict[str, TrunkUpdate]:
        return self._found

    def end_round(self, run_id: str) -> None:
        pass


def test_a_gradient_of_nothing_hides_nobody() -> None:
    pool = PoolOfMany(_Learnt(TrunkUpdate(state={"a": torch.zeros(1)}, weight=0)), min_cohort=3)
    with pytest.raises(QuorumNotMet, match="of 2 owners' updates"):
        pool.collect("clinics.r1.a1", (*OWNERS, "clinic-c"), UpdateKind.GRADIENT)


@pytest.mark.parametrize(
    "third",
    [
        None,
        TrunkUpdate(state={"a": torch.ones(1)}, weight=0),
        TrunkUpdate(state={"a": torch.full((1,), torch.nan)}, weight=5),
    ],
    ids=["nothing learnt", "no token", "NaN"],
)
def test_an_answer_without_an_update_hides_nobody(third: TrunkUpdate | None) -> None:
    members = (*OWNERS, "clinic-c")
    pool = PoolOfMany(_Learnt(third), min_cohort=3)
    with pytest.raises(QuorumNotMet, match=r"of 2 owners' updates.*min_cohort=3"):
        pool.collect("clinics.r1.a1", members, UpdateKind.DELTA)
    two = PoolOfMany(_Learnt(third), min_cohort=2)
    assert set(OWNERS) <= set(two.collect("clinics.r1.a1", members, UpdateKind.DELTA))


def test_the_enclave_makes_no_average_of_too_few(tmp_path: Path, model: Path) -> None:
    rounds = _rounds(model, tmp_path, min_members=1, quorum=1, max_attempts=1)
    changes = _member(model, tmp_path / "a", 16)
    changes["rounds"] = {"name": "clinics", "min_cohort": 1}
    with running_enclave(rounds) as server:
        assert server.federation is not None
        # As if the settings had let it: the last barrier is where updates are taken.
        coordinator = server.federation._coordinator
        coordinator._cycle._trunk = PoolOfMany(coordinator._cycle._trunk, min_cohort=2)
        with (
            owner_of(server, owner_settings(model, tmp_path / "a", **changes)) as owner,
            pytest.raises(QuorumNotMet, match=r"rounds\.min_cohort=2"),
        ):
            owner.train()
        assert server.federation.status().round == 0


def test_other_adapter_settings_are_refused_before_the_first_round(
    tmp_path: Path, model: Path
) -> None:
    changes = _member(model, tmp_path / "a", 16, adapter={"rank": 2})
    with (
        running_enclave(_rounds(model, tmp_path)) as server,
        owner_of(server, owner_settings(model, tmp_path / "a", **changes)) as owner,
        pytest.raises(ConfigError, match=r"adapter\.rank"),
    ):
        owner.train()


def test_an_enclave_without_rounds_says_so(tmp_path: Path, model: Path) -> None:
    changes = _member(model, tmp_path / "a", 8)
    with (
        running_enclave(enclave_settings(model, tmp_path)) as server,
        owner_of(server, owner_settings(model, tmp_path / "a", **changes)) as owner,
        pytest.raises(ProtocolError, match=r"this enclave has no \[rounds\]"),
    ):
        owner.train()
