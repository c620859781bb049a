"""Validation: the best step is kept on both sides, and a run that gets worse ends early."""

from pathlib import Path

import pytest

from cutlayer import Client
from cutlayer.client.session import Feed
from tests.tiny_models import tiny_llama_folder
from tests.worlds import client_of, client_settings, running_server, server_settings

CHANGES = {
    "data__validation_fraction": 0.25,
    "train__steps": 40,
    "train__lr": 0.3,
    "train__schedule": "constant",
    "train__eval_every": 2,
    "train__patience": 4,
    "train__save_every": 3,
}


def _validation_loss(client: Client) -> float:
    """Of the adapters that generation uses, computed anew."""
    rows = client.rows().validation
    total, count = 0.0, 0
    for row in rows:
        session = client.session([len(row.tokens)])
        for position, token in enumerate(row.tokens[:-1]):
            logits_V = session.step([Feed(row=0, tokens=[token])])[0][0]
            target = row.labels[position + 1]
            if target != -100:
                total -= float(logits_V.log_softmax(-1)[target])
                count += 1
        session.close()
    return total / count


def test_a_run_that_gets_worse_stops_and_its_best_step_is_what_is_used(tmp_path: Path) -> None:
    model = tiny_llama_folder(tmp_path)
    settings = client_settings(model, tmp_path, **CHANGES)
    with (
        running_server(server_settings(model, tmp_path)) as server,
        client_of(server, settings) as client,
    ):
        progress = client.train()
        assert progress.step < 40
        assert progress.num_worse == 4
        assert progress.best_step is not None
        losses = {int(step): loss for step, loss in progress.evaluations.items()}
        assert losses[progress.best_step] == min(losses.values())
        assert client.export(tmp_path / "adapter") == progress.best_step
        assert _validation_loss(client) == pytest.approx(losses[progress.best_step], rel=1e-4)
        assert client.train().step == progress.step
