"""`cutlayer placement`: each shape is told, and what cannot be is refused."""

from pathlib import Path

import pytest

from cutlayer.demo.settings_text import settings_text
from cutlayer.settings import Settings
from tests.chain_worlds import THREE, chain_settings, six_blocks
from tests.enclave_worlds import owner_settings
from tests.unit.cli.cli_world import Ran, run_command
from tests.worlds import client_settings

HOP = {
    "lower": 1,
    "upper": 3,
    "connection": {"address": "127.0.0.1:2"},
    "privacy": {"mechanism": "gaussian", "scale": 0.02},
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return six_blocks(tmp_path_factory.mktemp("model"))


def _told(capsys: pytest.CaptureFixture[str], folder: Path, settings: Settings, *more: str) -> Ran:
    path = folder / "settings.toml"
    path.write_text(settings_text(settings))
    return run_command(capsys, "placement", "--config", path, *more)


def test_the_u_is_one_value_of_it(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ran = _told(capsys, tmp_path, client_settings(model, tmp_path, model__upper=5), "--json")
    assert ran.code == 0, ran.err
    assert ran.result["shape"] == "client-server-client"
    assert [hop["blocks"] for hop in ran.result["hops"]] == [[0, 1], [1, 5], [5, 6]]  # type: ignore[attr-defined]


def test_hosts_in_a_row_are_told_with_what_each_of_them_sees(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    places = ("server", "member", "server")
    clipped = {"mechanism": "clipped_gaussian", "scale": 2.0, "clip": 30.0}
    settings = chain_settings(model, tmp_path, THREE, places=places, privacy=clipped)
    ran = _told(capsys, tmp_path, settings)
    assert ran.code == 0, ran.err
    assert "client-server-member-server-client: each of 6 blocks has one place" in ran.out
    assert "2. member (blocks 2 to 3), 127.0.0.1:2" in ran.out
    assert "hidden states in: clipped_gaussian scale=2.0 clip=30.0" in ran.out
    assert "as a member" in ran.out
    assert "tells none of them of the others" in " ".join(ran.out.split())


@pytest.mark.parametrize("labels", ["client", "server"])
def test_labels_at_a_server_are_said_loudly(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], labels: str
) -> None:
    settings = owner_settings(model, tmp_path / "a", labels=labels, hops=[HOP])
    ran = _told(capsys, tmp_path, settings, "--json")
    assert ran.code == 0, ran.err
    shared = labels == "server"
    assert ran.result["shares_labels"] is shared
    assert ran.result["shape"] == "client-server-" + ("server" if shared else "enclave")
    assert ("labels and the distribution of the text are visible" in ran.err) == shared
    # These settings waive the proof: whoever stands in the enclave's place may be anybody.
    assert ("WITHOUT PROOF" in ran.err) == (not shared)


@pytest.mark.parametrize(
    ("lower", "upper", "said"),
    [
        (3, 5, "no place"),
        (1, 5, "two places"),
        (2, 2, "has no block"),
    ],
)
def test_a_hole_an_overlap_and_an_empty_hop_are_refused(
    model: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    lower: int,
    upper: int,
    said: str,
) -> None:
    settings = chain_settings(model, tmp_path, (1, 2, 5))
    text = settings_text(settings)
    wrong = text.replace("lower = 2, upper = 5", f"lower = {lower}, upper = {upper}")
    assert wrong != text
    path = tmp_path / "settings.toml"
    path.write_text(wrong)
    ran = run_command(capsys, "placement", "--config", path)
    assert ran.code == 2
    assert said in " ".join(ran.err.split())


def test_blocks_that_the_model_does_not_have_are_refused(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = chain_settings(model, tmp_path, (1, 2, 9))
    ran = _told(capsys, tmp_path, settings)
    assert ran.code == 2
    assert "before 9; the model has 6" in " ".join(ran.err.split())
