"""`cutlayer audit attack` on a recording of a real run."""

import json
from pathlib import Path

import pytest
import torch
import typer
from safetensors.torch import save_file
from typer.testing import CliRunner

from cutlayer.cli.audit_attack import attack
from cutlayer.errors import ConfigError, ModelError, SpecMismatch, StorageError
from tests.tiny_models import tiny_llama_folder
from tests.worlds import client_of, client_settings, running_server, server_settings

app = typer.Typer()
app.command()(attack)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, a recording of two steps and its truth."""
    return recorded(tmp_path_factory.mktemp("recorded"))


def recorded(folder: Path, **changes: object) -> Path:
    """Record two steps, and export the adapters."""
    model = tiny_llama_folder(folder)
    table = {"train__steps": 2, "train__rows_per_step": 3, **changes}
    settings = client_settings(
        model,
        folder,
        run__record_file=str(folder / "run.recording"),
        run__record_truth=True,
        **table,
    )
    with (
        running_server(server_settings(model, folder)) as server,
        client_of(server, settings) as client,
    ):
        client.train()
        client.export(folder / "exported")
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


def test_a_recording_with_withheld_vectors_is_attacked_and_all_its_tokens_count(
    tmp_path: Path,
) -> None:
    rows = tmp_path / "answers.jsonl"
    lines = [{"text": "ab" * (2 + n % 3), "answer": "pq"[n % 2]} for n in range(9)]
    rows.write_text("".join(json.dumps(line) + "\n" for line in lines))
    recorded(
        tmp_path,
        privacy__withhold="private",
        data__train=str(rows),
        data__completion_template="{answer}",
        data__append_eos=False,
    )
    truth = str(tmp_path / "run.recording.truth")
    for name in ("vocabulary_matching", "language_prior", "label_inference"):
        score = run(tmp_path, name, "--truth", truth)["score"]
        assert isinstance(score, dict)
        assert score["recovery"]["num"] >= 6, name
    assert run(tmp_path, "vocabulary_matching")["score"] is None


def test_adapters_of_a_colluding_client_are_used(tmp_path: Path) -> None:
    recorded(tmp_path, train__lr=0.3, train__steps=3, train__schedule="constant")
    truth, given = str(tmp_path / "run.recording.truth"), str(tmp_path / "exported")
    alone = run(tmp_path, "vocabulary_matching", "--truth", truth)
    helped = run(tmp_path, "vocabulary_matching", "--truth", truth, "--adapters", given)
    assert (alone["threat"], helped["threat"]) == ("T1", "T2")
    assert alone["score"] != helped["score"]


def test_adapters_that_are_none_or_of_another_model_are_refused(
    folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(ModelError, match="cutlayer export"):
        run(folder, "language_prior", "--adapters", str(tmp_path))
    (tmp_path / "adapter_config.json").write_text('{"r": 4, "lora_alpha": 8}')
    other = {"base_model.model.other.layers.0.q_proj.lora_A.weight": torch.zeros(4, 8)}
    save_file(other, tmp_path / "adapter_model.safetensors")
    with pytest.raises(ModelError):
        run(folder, "language_prior", "--adapters", str(tmp_path))
