"""Measuring really runs a client's code, a link's calls and an empty process."""

from pathlib import Path

import pytest

from cutlayer import TrunkServer
from cutlayer.errors import TransportError
from cutlayer.model.folder import resolve_model
from cutlayer.planner.baseline import measure_baseline, peak_resident_bytes
from cutlayer.planner.link_test import measure_link
from cutlayer.planner.measure import available_memory, measure_here
from cutlayer.planner.shapes import read_shapes
from cutlayer.planner.workload import Workload
from tests.tiny_models import tiny_model
from tests.worlds import client_settings, server_settings


@pytest.mark.parametrize("family", ["gpt2"])
def test_this_machine_is_measured_with_the_models_own_code(family: str, tmp_path: Path) -> None:
    config = resolve_model(tiny_model(family, tmp_path)[0]).config
    workload = Workload(mean_length=16, rows_per_step=2, prompt_tokens=8, streams=2)
    shapes = read_shapes(config, "float32", workload.adapter)
    found = measure_here(shapes, workload, budget_s=0.0, with_baseline=False)
    speed, ends = found.client, found.ends
    assert ends is not None
    for seconds in (speed.forward_s, speed.backward_s, speed.prefill_s, speed.decode_s):
        assert seconds is not None
        assert 0 < seconds < 60
    assert 0 < ends.head_s < ends.tail_s
    assert found.baseline is None
    assert found.client_memory == available_memory() or found.client_memory is not None


def test_an_empty_process_holds_about_what_this_one_began_with() -> None:
    found = measure_baseline(1)
    assert 200_000_000 < found < 1_500_000_000
    assert found < 2 * peak_resident_bytes()


def test_a_link_is_measured_without_a_run_or_a_session(tmp_path: Path) -> None:
    model, _ = tiny_model("llama", tmp_path)
    server = TrunkServer(server_settings(model, tmp_path))
    server.start()
    try:
        address = f"127.0.0.1:{server.port}"
        settings = client_settings(model, tmp_path, connection__address=address)
        link = measure_link(settings, resolve_model(model))
    finally:
        server.stop(grace_s=0)
    assert 0 < link.rtt_s < 1
    assert link.mbit_per_s is None or link.mbit_per_s > 1
    assert not list((tmp_path / "server").glob("runs/*/*"))


def test_a_server_that_is_away_is_refused_with_what_to_do(tmp_path: Path) -> None:
    model, _ = tiny_model("llama", tmp_path)
    with pytest.raises(TransportError, match="--rtt-ms"):
        measure_link(client_settings(model, tmp_path), resolve_model(model))
