"""A run that a policy re-cuts learns what a run that nobody touches learns."""

import logging
from pathlib import Path

import pytest

from cutlayer.client.client import Client
from cutlayer.client.run_state import Progress
from cutlayer.client.settings import ClientSettings
from tests.tiny_models import tiny_llama_folder
from tests.worlds import client_of, client_settings, running_server, server_settings

ALWAYS_SHORT = 1e6
"""GB that no machine has."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama_folder(tmp_path_factory.mktemp("model"))


def _settings(model: Path, folder: Path, **changes: object) -> ClientSettings:
    folder.mkdir()
    return client_settings(model, folder, recut__look_every_s=1e-6, **changes)


def _trained(model: Path, folder: Path, **changes: object) -> tuple[Progress, Client]:
    settings = _settings(model, folder, **changes)
    with (
        running_server(server_settings(model, folder)) as server,
        client_of(server, settings) as client,
    ):
        return client.train(), client


def _losses(progress: Progress) -> list[float]:
    return [record.loss for record in progress.history]


@pytest.mark.parametrize("kind", ["memory", "link"])
def test_losses_go_on_as_if_nothing_had_happened(model: Path, tmp_path: Path, kind: str) -> None:
    short = {"below_gb": ALWAYS_SHORT} if kind == "memory" else {"above_rtt_ms": 1e-6}
    plain, _ = _trained(model, tmp_path / "plain")
    policy: dict[str, object] = {f"recut__{kind}": {**short, "cut": [2, 3]}}
    moved, client = _trained(model, tmp_path / "moved", **policy)
    assert (client.settings.model.lower, client.settings.model.upper) == (2, 3)
    assert _losses(moved) == pytest.approx(_losses(plain), rel=1e-6)


def test_a_policy_without_consent_hands_no_block_over(
    model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    policy: dict[str, object] = {"recut__memory": {"below_gb": ALWAYS_SHORT, "cut": [1, 3]}}
    with caplog.at_level(logging.WARNING):
        progress, client = _trained(model, tmp_path / "run", model__lower=2, **policy)
    assert client.settings.model.lower == 2
    assert progress.step == 6
    assert caplog.text.count("share_adapter") == 1


def test_a_cut_that_the_server_does_not_hold_is_refused_once_and_the_run_goes_on(
    model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    policy: dict[str, object] = {
        "recut__memory": {"below_gb": ALWAYS_SHORT, "cut": [0, 4]},
        "recut__share_adapter": True,
    }
    with caplog.at_level(logging.WARNING):
        progress, client = _trained(model, tmp_path / "run", **policy)
    assert client.settings.model.lower == 1
    assert progress.step == 6
    assert caplog.text.count("is refused") == 1
