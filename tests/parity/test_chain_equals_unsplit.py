"""Trunk hosts in a row against the unsplit model, and against one trunk with the same blocks."""

from pathlib import Path

import pytest
import torch

from cutlayer.client.settings import SamplingSettings
from tests.chain_worlds import (
    THREE,
    TWO,
    chain_settings,
    client_of_hops,
    hop_server,
    running_hops,
    six_blocks,
)
from tests.parity.test_generation_equals_unsplit import PROMPTS, _unsplit
from tests.parity.test_training_equals_unsplit import _unsplit_losses
from tests.worlds import client_of, client_settings, running_server

GREEDY = SamplingSettings(max_new_tokens=10)


@pytest.mark.parametrize(("edges", "in_flight"), [(TWO, 1), (TWO, 3), (THREE, 2)])
def test_losses_norms_and_export_equal_those_of_unsplit_peft(
    tmp_path: Path, edges: tuple[int, ...], in_flight: int
) -> None:
    model = six_blocks(tmp_path)
    settings = chain_settings(model, tmp_path, edges, train__in_flight=in_flight)
    with (
        running_hops(model, tmp_path, edges) as servers,
        client_of_hops(servers, settings) as client,
    ):
        history = client.train().history
        client.export(tmp_path / "first", step=0)
        losses, norms = _unsplit_losses(client, tmp_path / "first", model)
    assert [record.loss for record in history] == pytest.approx(losses, rel=1e-5)
    assert [record.grad_norm for record in history] == pytest.approx(norms, rel=1e-5)
    assert history[-1].loss < 0.85 * history[0].loss
