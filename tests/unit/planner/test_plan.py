"""Feasible cuts, refusals with their reasons, and the smallest memory that would do."""

import pytest
from transformers import PreTrainedConfig

from cutlayer.errors import ConfigError
from cutlayer.model.folder import resolve_model
from cutlayer.model.partition import Cut
from cutlayer.planner.measurements import Measured, Measurements
from cutlayer.planner.plan import CutPlan, all_cuts, feasible, plan_cuts
from cutlayer.planner.shapes import read_shapes
from cutlayer.planner.workload import Workload
from tests.tiny_models import tiny_llama_folder
from tests.unit.planner.plans import NUMBERS, count_once

_WORK = Workload(mean_length=16, rows_per_step=2, prompt_tokens=8, new_tokens=8)


@pytest.fixture(autouse=True)
def _count_once(monkeypatch: pytest.MonkeyPatch) -> None:
    count_once(monkeypatch)


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedConfig:
    return resolve_model(tiny_llama_folder(tmp_path_factory.mktemp("model"))).config


def _plans(
    config: PreTrainedConfig,
    numbers: Measurements = NUMBERS,
    served: range = range(4),
    work: Workload = _WORK,
) -> list[CutPlan]:
    return plan_cuts(read_shapes(config, work.dtype, work.adapter), work, numbers, served)


def test_every_cut_leaves_a_trunk() -> None:
    cuts = all_cuts(4)
    assert len(set(cuts)) == len(cuts) == 10
    assert Cut(0, 4) in cuts
    assert all(cut.lower < cut.upper for cut in cuts)


def test_more_blocks_at_the_client_take_more_memory_there_and_less_at_the_server(
    config: PreTrainedConfig,
) -> None:
    by_cut = {plan.cut: plan for plan in _plans(config)}
    few, many = by_cut[Cut(1, 4)], by_cut[Cut(2, 3)]
    assert few.client.weights < many.client.weights
    assert few.client.training < many.client.training
    assert few.server.training > many.server.training
    whole = few.client.weights + few.server.weights
    assert whole == many.client.weights + many.server.weights


def test_cuts_outside_the_servers_blocks_are_refused_by_name(config: PreTrainedConfig) -> None:
    plans = _plans(config, served=range(1, 3))
    kept = feasible(plans, NUMBERS)
    assert {plan.cut for plan in kept} == {Cut(1, 2), Cut(1, 3), Cut(2, 3)}
    assert all("blocks 1 to 2" in str(p.refusal) for p in plans if p not in kept)


def test_too_little_memory_for_any_cut_says_what_would_do(config: PreTrainedConfig) -> None:
    poor = NUMBERS.model_copy(update={"client_memory": Measured(num_bytes=1000, source="given")})
    plans = _plans(config, poor)
    least = min(plan.client.total for plan in plans)
    with pytest.raises(ConfigError, match=f"{least / 1e9:.2f} GB at the client"):
        feasible(plans, poor)


def test_a_server_without_memory_is_named(config: PreTrainedConfig) -> None:
    poor = NUMBERS.model_copy(update={"server_memory": Measured(num_bytes=1000, source="given")})
    with pytest.raises(ConfigError, match="server memory"):
        feasible(_plans(config, poor), poor)


@pytest.mark.parametrize("served", [range(0), range(3, 2), range(2, 9)])
def test_a_server_without_blocks_of_the_model_is_refused(
    served: range, config: PreTrainedConfig
) -> None:
    with pytest.raises(ConfigError, match="--server-blocks"):
        _plans(config, served=served)


def test_rows_beyond_the_context_are_refused(config: PreTrainedConfig) -> None:
    with pytest.raises(ConfigError, match="context of 128"):
        _plans(config, work=Workload(mean_length=200))


def test_longer_rows_and_more_of_them_take_more_memory(config: PreTrainedConfig) -> None:
    small, large = (
        {plan.cut: plan for plan in _plans(config, work=work)}[Cut(1, 3)].client
        for work in (_WORK, _WORK.model_copy(update={"mean_length": 64}))
    )
    assert small.activations < large.activations
    assert small.weights == large.weights
