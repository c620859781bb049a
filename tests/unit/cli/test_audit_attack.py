"""`cutlayer audit attack` on a recording of a real run."""

import json
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from cutlayer.cli.audit_attack import attack
from cutlayer.errors import ConfigError, SpecMismatch, StorageError
from tests.tiny_models import tiny_llama_folder
from tests.worlds import client_of, client_settings, running_server, server_settings

app = typer.Typer()
app.command()(attack)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, a recording of two steps and its truth."""
    folder = tmp_path_factory.mktemp("recorded")
    model = tiny_llama_folder(folder)
    settings = client_settings(
        model,
        folder,
        run__record_file=str(folder / "run.recording"),
        run__record_truth=True,
        train__steps=2,
        train__rows_per_step=3,
    )
    with (
        running_server(server_settings(model, folder)) as server,
        client_of(server, settings) as client,
    ):
        client.train()
    return folder


def run(folder: Path, name: str, *options: str) -> dict[str, object]:
    model = str(folder / "tiny-llama")
    arguments = [str(folder / "run.recording"), "--attack", name, "--model", model, "--json"]
    done = CliRunner().invoke(app, [*arguments, *options])
    if done.exception is not None:
        raise done.exception
    result = json.loads(done.stdout.splitlines()[-1])
    assert isinstance(result, dict)
    return result


def test_a_recording_is_attacked_and_scored(folder: Path) -> None:
    truth = str(folder / "run.recording.truth")
    strong = run(folder, "vocabulary_matching", "--truth", truth)
    alone = run(folder, "language_prior", "--truth", truth)
    assert strong["observations"] == alone["observations"] == 6
    assert isinstance(strong["score"], dict)
    assert isinstance(alone["score"], dict)
    assert strong["score"]["recovery"]["value"] > 0.8
    assert alone["score"]["recovery"]["value"] < 0.3


def test_without_truth_it_runs_and_scores_nothing(folder: Path) -> None:
    result = run(folder, "language_prior")
    assert result["score"] is None
    assert not any(isinstance(value, list) for value in result.values()), "no token is printed"


@pytest.mark.parametrize("size", [40, 3000])
def test_a_recording_cut_short_is_refused_unless_accepted(
    folder: Path, tmp_path: Path, size: int
) -> None:
    data = (folder / "run.recording").read_bytes()
    (tmp_path / "run.recording").write_bytes(data[:-size])
    (tmp_path / "tiny-llama").symlink_to(folder / "tiny-llama")
    with pytest.raises(StorageError, match="cut short"):
        run(tmp_path, "language_prior")
    assert run(tmp_path, "language_prior", "--truncated")["score"] is None


def test_an_unknown_attack_and_another_model_are_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="known:"):
        run(folder, "magic")
    other = tiny_llama_folder(tmp_path, seed=5)
    with pytest.raises(SpecMismatch, match="another model"):
        run(folder, "language_prior", "--model", str(other))
