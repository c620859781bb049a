"""`cutlayer eval task` and `score`: files from a source, a score back, clear mistakes."""

import json
from pathlib import Path

import pytest

from cutlayer.data.assets import fetch
from cutlayer.evaluation.published.task_files import open_task
from cutlayer.evaluation.report import choice_outcome, predictions
from cutlayer.evaluation.tasks import ChoiceItem, read_items
from tests.unit.cli.cli_world import run_command
from tests.unit.evaluation.published.made_up_asset import made_up_archive, pin


@pytest.fixture
def cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache with a made-up asset `evaluation`."""
    archive = made_up_archive(tmp_path / "bigbench-1.0.0.tar.gz")
    pin(archive, monkeypatch)
    monkeypatch.setenv("CUTLAYER_CACHE", str(tmp_path / "cache"))
    fetch("evaluation", archive=archive)


def _right_answers(folder: Path) -> Path:
    """Predictions that choose every right answer, as `cutlayer eval --out` writes them."""
    test = open_task(folder).test
    outcomes = []
    for item in read_items(test):
        assert isinstance(item, ChoiceItem)
        scores = [0.0 if place == item.answer else -1.0 for place in range(len(item.choices))]
        outcomes.append(choice_outcome(item.where, scores, item.choices, item.answer))
    path = folder.parent / "predictions.jsonl"
    path.write_bytes(b"".join(predictions(outcomes)))
    return path


@pytest.mark.usefixtures("cached")
def test_a_task_is_written_and_its_predictions_are_scored(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "task"
    rows = ("--train-rows", 4, "--test-rows", 9, "--seed", 1)
    ran = run_command(capsys, "eval", "task", "multirc", "--out", folder, *rows, "--json")
    assert ran.code == 0, ran.err
    assert ran.result["is_demo_scale"] is True
    assert (ran.result["num_train"], ran.result["form"]) == (4, "plain")
    assert "demo-scale" in ran.err
    file = _right_answers(folder)
    ran = run_command(capsys, "eval", "score", folder, file, "--json")
    assert ran.code == 0, ran.err
    metrics = ran.result["metrics"]
    assert isinstance(metrics, dict)
    assert set(metrics.values()) == {1.0}
    file.write_text("".join(file.read_text().splitlines(keepends=True)[:-1]))
    ran = run_command(capsys, "eval", "score", folder, file)
    assert ran.code == 5
    assert "score the task's whole test.jsonl" in ran.err


@pytest.mark.usefixtures("cached")
def test_people_get_a_table_that_says_demo_scale(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "task"
    assert run_command(capsys, "eval", "task", "multirc", "--out", folder).code == 0
    ran = run_command(capsys, "eval", "score", folder, _right_answers(folder))
    assert ran.code == 0, ran.err
    assert "demo-scale" in ran.out
    assert "1.0000" in ran.out


def test_original_files_are_read_from_their_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    boolq = tmp_path / "BoolQ"
    boolq.mkdir()
    for name in ("train", "val"):
        row = {"question": "is it", "passage": f"A {name}.", "idx": 0, "label": True}
        (boolq / f"{name}.jsonl").write_text(json.dumps(row) + "\n")
    chat = ("--form", "chat", "--json")
    folder = tmp_path / "task"
    ran = run_command(capsys, "eval", "task", "boolq", "--from", tmp_path, "--out", folder, *chat)
    assert ran.code == 0, ran.err
    assert ran.result["is_demo_scale"] is False
    (item,) = read_items(folder / "test.jsonl")
    assert isinstance(item, ChoiceItem)
    assert item.prompt.messages[0]["content"].startswith("A val.")
    assert item.choices == ("no", "yes")
    (boolq / "val.jsonl").write_text('{"question": "cut')
    ran = run_command(capsys, "eval", "task", "boolq", "--from", tmp_path, "--out", folder)
    assert ran.code == 5
    assert "val.jsonl:1" in ran.err


@pytest.mark.usefixtures("cached")
def test_an_own_template_and_a_models_form_are_taken(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = tmp_path / "words.toml"
    words.write_text('prompt = "{answer}?"\nchat = "Is it {answer}?"\n[choices]\nyes = "true"\n')
    options = ("--template", words, "--model", model, "--json")
    folder = tmp_path / "task"
    ran = run_command(capsys, "eval", "task", "multirc", "--out", folder, *options)
    assert ran.code == 0, ran.err
    assert ran.result["form"] == "chat"
    item = read_items(folder / "test.jsonl")[0]
    assert isinstance(item, ChoiceItem)
    assert item.prompt.messages[0]["content"].startswith("Is it ")
    assert item.choices == ("no", "true")


@pytest.mark.usefixtures("cached")
def test_mistakes_are_told_before_anything_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full/mine.txt").write_text("mine")
    (tmp_path / "file").write_text("")
    wrong = tmp_path / "wrong.toml"
    wrong.write_text('prompt = "{question}"\nstopp = ["x"]\n')
    out = ("--out", tmp_path / "task")
    for words, code, told in (
        (("sst2", *out), 2, "known: boolq, cb"),
        (("boolq", *out), 2, "no packaged rows of 'boolq'"),
        (("coqa", *out, "--form", "poem"), 2, "use plain or chat"),
        (("coqa", *out, "--from", tmp_path / "none"), 2, "is no folder"),
        (("coqa", *out, "--test-rows", 999), 5, "999 test rows wanted"),
        (("coqa", *out, "--template", wrong), 2, "is no template"),
        (("coqa", "--out", tmp_path / "full"), 2, "has other files"),
        (("coqa", "--out", tmp_path / "file"), 2, "is a file"),
    ):
        ran = run_command(capsys, "eval", "task", *words)
        assert (ran.code, told in ran.err) == (code, True), ran.err
    assert not (tmp_path / "task").exists()
    ran = run_command(capsys, "eval", "score", tmp_path / "full", tmp_path / "file")
    assert ran.code == 5
    assert "is no task folder" in ran.err


@pytest.mark.parametrize(
    "option", [("--json",), ("--limit", 3), ("--config", "none.toml"), ("--batch-tokens", 1024)]
)
def test_an_option_before_a_subcommand_is_not_lost(
    option: tuple[object, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    ran = run_command(capsys, "eval", *option, "score", "folder", "file")
    assert ran.code == 2
    assert f"{option[0]} stands before score; write it after" in ran.err


@pytest.mark.parametrize(
    ("words", "told"),
    [((), "Missing option '--config'"), (("--config", "x"), "Missing option '--tasks'")],
)
def test_scoring_a_task_file_still_asks_for_both_files(
    words: tuple[str, ...], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    ran = run_command(capsys, "eval", *words, "--json")
    assert ran.code == 2
    assert told in ran.err
    assert ran.result["error"] == "UsageError"
