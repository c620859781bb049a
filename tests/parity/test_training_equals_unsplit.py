"""Split training against the same steps of transformers + PEFT on the unsplit model."""

from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from tests.tiny_models import tiny_llama_folder
from tests.unsplit_worlds import unsplit_losses
from tests.worlds import client_of, client_settings, running_server, server_settings


@pytest.mark.parametrize("in_flight", [1, 3])
def test_losses_and_norms_equal_those_of_unsplit_peft(tmp_path: Path, in_flight: int) -> None:
    model = tiny_llama_folder(tmp_path)
    settings = client_settings(model, tmp_path, train__in_flight=in_flight)
    with (
        running_server(server_settings(model, tmp_path)) as server,
        client_of(server, settings) as client,
    ):
        history = client.train().history
        client.export(tmp_path / "first", step=0)
        losses, norms = unsplit_losses(
            client, tmp_path / "first", AutoModelForCausalLM.from_pretrained(model)
        )
    assert [record.loss for record in history] == pytest.approx(losses, rel=1e-5)
    assert [record.grad_norm for record in history] == pytest.approx(norms, rel=1e-5)
    assert history[-1].loss < 0.85 * history[0].loss


def test_frozen_head_needs_no_gradient_and_equals_peft_on_the_rest(tmp_path: Path) -> None:
    model = tiny_llama_folder(tmp_path)
    settings = client_settings(model, tmp_path, adapter__parts=["trunk", "tail"])
    with (
        running_server(server_settings(model, tmp_path)) as server,
        client_of(server, settings) as client,
    ):
        history = client.train().history
        client.export(tmp_path / "first", step=0)
        frozen_down = client.trunk.bytes_received
    trained = client_settings(model, tmp_path, run__folder=str(tmp_path / "trained"))
    with (
        running_server(server_settings(model, tmp_path / "other")) as server,
        client_of(server, trained) as client,
    ):
        client.train()
        assert frozen_down < 0.75 * client.trunk.bytes_received
    assert history[-1].loss < history[0].loss
