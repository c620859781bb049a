"""Predicted seconds: what is computed adds up, what overlaps does not, what waits is waited for."""

import pytest
from transformers import PreTrainedConfig

from cutlayer.model.adapters import AdapterSettings
from cutlayer.model.folder import resolve_model
from cutlayer.model.partition import Cut, Part
from cutlayer.planner.measurements import BlockSpeed, LinkSpeed, Measurements
from cutlayer.planner.seconds import Seconds, TimeModel
from cutlayer.planner.shapes import read_shapes
from cutlayer.planner.workload import Workload
from tests.tiny_models import tiny_llama_folder
from tests.unit.planner.plans import NUMBERS

_NO_LINK = LinkSpeed(rtt_s=0.0, mbit_per_s=None)


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedConfig:
    return resolve_model(tiny_llama_folder(tmp_path_factory.mktemp("model"))).config


def _at(
    config: PreTrainedConfig, cut: Cut, numbers: Measurements = NUMBERS, **work: object
) -> Seconds:
    workload = Workload.model_validate({"mean_length": 100, "prompt_tokens": 50, **work})
    shapes = read_shapes(config, "float32", workload.adapter)
    return TimeModel(shapes, workload, numbers).at(cut)


def _linked(link: LinkSpeed) -> Measurements:
    return NUMBERS.model_copy(update={"link": link})


def test_without_a_link_and_overlap_a_step_is_the_sum_of_its_parts(
    config: PreTrainedConfig,
) -> None:
    found = _at(config, Cut(1, 3), _linked(_NO_LINK), rows_per_step=10, in_flight=1)
    # One block before and one after at the client, two at the server, and the ends.
    assert found.training == pytest.approx(2 * 0.5 + 2 * 0.05 + 0.51)
    assert found.client_share == pytest.approx((2 * 0.5 + 0.51) / found.training)


def test_micro_batches_in_flight_hide_the_server(config: PreTrainedConfig) -> None:
    alone = _at(config, Cut(1, 3), rows_per_step=8, micro_batch_rows=2, in_flight=1).training
    together = _at(config, Cut(1, 3), rows_per_step=8, micro_batch_rows=2, in_flight=2).training
    assert alone is not None
    assert together is not None
    own = 2 * 0.5 + 0.51
    assert own < together < alone
    assert together - own < 0.6 * (alone - own)


def test_a_token_pays_the_round_trip_in_full(config: PreTrainedConfig) -> None:
    near = _at(config, Cut(1, 3), _linked(_NO_LINK)).decode
    far = _at(config, Cut(1, 3), _linked(LinkSpeed(rtt_s=0.1, mbit_per_s=None))).decode
    assert near is not None
    assert far is not None
    assert near == pytest.approx(1000 * (2 * 0.002 + 2 * 0.0002 + 0.01))
    assert far - near == pytest.approx(100.0)


def test_streams_share_a_round_trip(config: PreTrainedConfig) -> None:
    one, four = (_at(config, Cut(1, 3), streams=count).decode for count in (1, 4))
    assert one is not None
    assert four is not None
    assert four < one / 3


def test_a_slower_link_never_makes_a_cut_faster(config: PreTrainedConfig) -> None:
    times = [
        _at(config, Cut(1, 3), _linked(LinkSpeed(rtt_s=0.02, mbit_per_s=rate)))
        for rate in (1000.0, 10.0, 1.0)
    ]
    for name in ("training", "prefill", "decode"):
        values = [getattr(one, name) for one in times]
        assert values == sorted(values)
        assert values[0] < values[-1]


def test_a_head_that_does_not_learn_gets_no_gradient(config: PreTrainedConfig) -> None:
    frozen = AdapterSettings(parts=[Part.TRUNK, Part.TAIL])
    whole = _at(config, Cut(1, 3), _linked(_NO_LINK), in_flight=1).training
    rest = _at(config, Cut(1, 3), _linked(_NO_LINK), in_flight=1, adapter=frozen).training
    assert whole is not None
    assert rest == pytest.approx(whole - 0.3)


def test_a_long_prompt_overlaps_and_a_short_one_does_not(config: PreTrainedConfig) -> None:
    numbers = _linked(LinkSpeed(rtt_s=0.0, mbit_per_s=None)).model_copy(
        update={"server": NUMBERS.client}
    )
    short = _at(config, Cut(1, 3), numbers, prompt_tokens=60, prefill_tokens=60).prefill
    long = _at(config, Cut(1, 3), numbers, prompt_tokens=60, prefill_tokens=10).prefill
    assert short is not None
    assert long is not None
    assert long < short + 6 * 0.01 / 0.06


@pytest.mark.parametrize(
    "missing", [{"link": None}, {"ends": None}, {"server": BlockSpeed()}, {"client": BlockSpeed()}]
)
def test_what_is_unknown_stays_unknown(
    config: PreTrainedConfig, missing: dict[str, object]
) -> None:
    found = _at(config, Cut(1, 3), NUMBERS.model_copy(update=missing))
    assert (found.training, found.prefill, found.decode) == (None, None, None)
