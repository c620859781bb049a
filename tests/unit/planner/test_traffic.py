"""Predicted bytes are those that a client really sends."""

from pathlib import Path

import pytest

from cutlayer import Client
from cutlayer.client.session import Feed
from cutlayer.client.settings import TrainSettings
from cutlayer.client.train import Report, TrainingData
from cutlayer.data.batches import BatchPlan
from cutlayer.data.template import Example
from cutlayer.model.adapters import AdapterSettings
from cutlayer.model.folder import resolve_model
from cutlayer.model.partition import Part
from cutlayer.planner.shapes import read_shapes
from cutlayer.planner.traffic import Traffic, TrafficModel
from cutlayer.planner.workload import Workload
from tests.tiny_models import tiny_llama_folder
from tests.worlds import client_of, client_settings, running_server, server_settings

_LENGTH, _ROWS = 24, 4


def _step_bytes(client: Client) -> Traffic:
    """Of the third step, which carries the commit of the second."""
    seen: list[tuple[int, int]] = []

    def note(report: Report) -> None:
        seen.append((client.trunk.bytes_sent, client.trunk.bytes_received))

    tokens = [1 + place for place in range(_LENGTH)]
    rows = [Example(tokens=tokens, labels=tokens, row_id=row) for row in range(_ROWS)]
    plan = BatchPlan(num_rows=_ROWS, rows_per_step=_ROWS, steps=4, micro_batch_rows=2)
    settings = TrainSettings(steps=4, rows_per_step=_ROWS, micro_batch_rows=2)
    client.trainer(TrainingData(train=rows, validation=[], plan=plan), settings).run(note)
    (up, down), (later_up, later_down) = seen[1], seen[2]
    return Traffic(up=later_up - up, down=later_down - down)


@pytest.mark.parametrize("codec", ["raw", "int8"])
@pytest.mark.parametrize("parts", [list(Part), [Part.TRUNK, Part.TAIL], [Part.TAIL]])
def test_a_step_weighs_what_it_is_said_to(codec: str, parts: list[Part], tmp_path: Path) -> None:
    model = tiny_llama_folder(tmp_path)
    changes = {"connection__codec": codec, "adapter__parts": [str(part) for part in parts]}
    settings = client_settings(model, tmp_path, **changes)
    workload = Workload(
        mean_length=_LENGTH,
        rows_per_step=_ROWS,
        micro_batch_rows=2,
        codec=codec,
        adapter=settings.adapter,
    )
    with (
        running_server(server_settings(model, tmp_path)) as server,
        client_of(server, settings) as client,
    ):
        measured = _step_bytes(client)
        shapes = read_shapes(client._folder.config, "float32", settings.adapter)
    found = TrafficModel(shapes, workload).step(head_blocks=1)
    # Numbers in headers differ by a byte or two, and frames are filled up to eight.
    assert found.up == pytest.approx(measured.up, abs=8 * 4 + 100)
    assert found.down == pytest.approx(measured.down, abs=8 * 4 + 32)


def test_a_token_and_a_prompt_weigh_what_they_are_said_to(tmp_path: Path) -> None:
    model = tiny_llama_folder(tmp_path)
    settings = client_settings(model, tmp_path, connection__codec="bf16")
    with (
        running_server(server_settings(model, tmp_path)) as server,
        client_of(server, settings) as client,
    ):
        session = client.session([40])
        session.step([Feed(row=0, tokens=[1])])
        row, marks = session.open_row(40), [client.trunk.bytes_sent]
        for tokens in ([1] * 16, [2]):
            session.step([Feed(row=row, tokens=tokens)])
            marks.append(client.trunk.bytes_sent)
        shapes = read_shapes(client._folder.config, "float32", AdapterSettings())
    work = Workload(prompt_tokens=16, new_tokens=24, mean_length=16, codec="bf16")
    model_ = TrafficModel(shapes, work)
    assert model_.prompt().up == pytest.approx(marks[1] - marks[0], abs=48)
    assert model_.token().up == pytest.approx(marks[2] - marks[1], abs=48)


def test_a_long_prompt_leaves_in_pieces(tmp_path: Path) -> None:
    config = resolve_model(tiny_llama_folder(tmp_path)).config
    shapes = read_shapes(config, "float32", AdapterSettings())
    whole = TrafficModel(shapes, Workload(prompt_tokens=64, prefill_tokens=64)).prompt()
    pieces = TrafficModel(shapes, Workload(prompt_tokens=64, prefill_tokens=16)).prompt()
    assert 0 < pieces.up - whole.up < 3 * 200
