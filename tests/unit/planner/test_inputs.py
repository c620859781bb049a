"""What is given takes the place of what was measured, by name; nonsense is refused."""

from pathlib import Path

import pytest

from cutlayer.client.settings import ClientSettings
from cutlayer.errors import ConfigError
from cutlayer.model.folder import resolve_model
from cutlayer.planner.inputs import (
    DEFAULT_LINK,
    Given,
    SideSeconds,
    parse_blocks,
    with_given,
    workload_of,
)
from cutlayer.planner.measurements import Measurements, read_measurements, write_measurements
from tests.tiny_models import tiny_llama_folder
from tests.unit.planner.plans import NUMBERS
from tests.worlds import client_settings


def test_seconds_of_a_block_keep_the_measured_shares_and_scale_the_ends() -> None:
    found = with_given(NUMBERS, Given(client=SideSeconds(train_s=1.0)))
    assert found.client.forward_s == pytest.approx(0.4)
    assert found.client.backward_s == pytest.approx(0.6)
    assert found.client_source == "given"
    assert found.ends is not None
    assert found.ends.tail_s == pytest.approx(1.0)
    assert found.ends_source.startswith("derived")
    assert found.server == NUMBERS.server


def test_a_link_that_nobody_knows_is_the_default_and_says_so() -> None:
    found = with_given(Measurements(), Given())
    assert found.link == DEFAULT_LINK
    assert found.link_source.startswith("default")
    half = with_given(Measurements(), Given(rtt_ms=5.0))
    assert half.link is not None
    assert half.link.rtt_s == 0.005
    assert "default" in half.link_source


def test_memory_is_given_in_gigabytes() -> None:
    found = with_given(Measurements(), Given(client_memory_gb=4.0, baseline_memory_gb=0.5))
    assert found.client_memory is not None
    assert found.client_memory.num_bytes == 4_000_000_000
    assert found.baseline is not None
    assert found.baseline.source == "given"


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"client_memory_gb": -1.0}, "--client-memory"),
        ({"rtt_ms": float("nan")}, "--rtt-ms"),
        ({"mbit_per_s": 0.0}, "--mbit-per-s"),
        ({"baseline_memory_gb": float("inf")}, "--baseline-memory"),
    ],
)
def test_nonsense_numbers_are_refused_by_name(wrong: dict[str, float], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        Given(**wrong)  # type: ignore[arg-type]


def test_a_negative_time_is_refused() -> None:
    with pytest.raises(ConfigError, match="train_s"):
        Given(server=SideSeconds(train_s=-0.1))


@pytest.mark.parametrize("text", ["2", "a:b", "2:", "-1:3", ":"])
def test_blocks_that_are_no_range_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="LOWER:UPPER"):
        parse_blocks(text, 8)


def test_blocks_are_a_range_and_all_by_default() -> None:
    assert parse_blocks("2:6", 8) == range(2, 6)
    assert parse_blocks(None, 8) == range(8)


def test_measurements_survive_their_file(tmp_path: Path) -> None:
    write_measurements(tmp_path / "numbers.json", NUMBERS)
    assert read_measurements(tmp_path / "numbers.json") == NUMBERS


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        '{"format": 99}',
        '{"client": {"forward_s": -1}}',
        '{"speed": 1}',
        '{"client": {"forward_s": Infinity}}',
        '{"link": {"rtt_s": 0.1, "mbit_per_s": 1e400}}',
        '{"client_source": "\\u001b[31mmeasured here"}',
        '{"machine": "' + "x" * 501 + '"}',
        "[" * 100_000,
        " " * (1 << 20) + "{}",
    ],
)
def test_a_file_that_holds_no_measurements_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "numbers.json").write_text(text)
    with pytest.raises(ConfigError):
        read_measurements(tmp_path / "numbers.json")
    with pytest.raises(ConfigError, match="cannot read"):
        read_measurements(tmp_path / "nowhere.json")


def test_a_clients_settings_make_its_workload_and_count_its_rows(tmp_path: Path) -> None:
    model = tiny_llama_folder(tmp_path)
    settings: ClientSettings = client_settings(model, tmp_path, connection__codec="int8")
    workload, source = workload_of(settings, resolve_model(model))
    assert workload.rows == 24
    assert workload.micro_batches == (3, 3, 2)
    assert workload.codec == "int8"
    assert 2 < workload.mean_length < workload.longest
    assert 0 < workload.scored_share < 1
    assert "rows.jsonl" in source
