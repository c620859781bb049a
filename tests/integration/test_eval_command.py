"""`cutlayer eval` against a real server process: results, predictions, exit codes."""

import json
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from cutlayer.demo.processes import serving
from cutlayer.evaluation.published.catalogue import published_task
from cutlayer.evaluation.published.predictions import predictions_of
from cutlayer.evaluation.published.question import Question
from cutlayer.evaluation.published.task_files import Provenance, open_task, write_task
from cutlayer.evaluation.published.templates import Form
from tests.tiny_models import tiny_llama_folder
from tests.unit.cli.cli_world import CliWorld, make_world

ITEMS = [
    {"kind": "choice", "context": "A cow says", "choices": [" moo", " meow"], "answer": 0},
    {"kind": "choice", "context": "2 + 2 =", "choices": [" 4", " 5", " 6"], "answer": 1},
    {
        "kind": "generate",
        "messages": [{"role": "user", "content": "ab?"}],
        "answers": ["ab"],
        "metrics": ["rouge_l", "f1"],
        "max_new_tokens": 6,
    },
]


def _eval(world: CliWorld, address: str, *words: object) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [
            *(sys.executable, "-m", "cutlayer.cli.main", "eval", "--config", str(world.client)),
            *("--set", f"connection.address={address}", *map(str, words)),
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[CliWorld, str, Path]]:
    folder = tmp_path_factory.mktemp("eval")
    world = make_world(tiny_llama_folder(folder), folder)
    with serving(world.server, folder) as server:
        yield world, server.address, folder


def _write(folder: Path, *items: object) -> Path:
    path = folder / "tasks.jsonl"
    path.write_text("".join(json.dumps(item) + "\n" for item in items))
    return path


def test_a_task_file_is_scored_and_predictions_are_private(
    served: tuple[CliWorld, str, Path],
) -> None:
    world, address, folder = served
    tasks, out = _write(folder, *ITEMS), folder / "predictions.jsonl"
    done = _eval(world, address, "--tasks", tasks, "--out", out, "--json")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert set(result["metrics"]) == {"accuracy", "accuracy_normalised", "f1", "rouge_l"}
    assert result["metrics"]["accuracy"]["n"] == 2
    assert result["metrics"]["f1"]["standard_error"] is None
    assert (result["num_items"], result["num_skipped"]) == (3, 0)
    assert result["guarantee"] == "no noise: none"
    assert result["tokens_per_s"] > 0
    assert result["bytes_up"] > result["num_vectors_released"] > 0
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert [line["where"] for line in lines] == [f"{tasks}:{n}" for n in (1, 2, 3)]
    assert len(lines[1]["log_likelihoods"]) == 3
    assert isinstance(lines[2]["reply"], str)
    assert stat.S_IMODE(out.stat().st_mode) == 0o600


def test_people_get_a_table_with_the_guarantee_and_the_first_items_alone(
    served: tuple[CliWorld, str, Path],
) -> None:
    world, address, folder = served
    done = _eval(world, address, "--tasks", _write(folder, *ITEMS), "--limit", 2)
    assert done.returncode == 0, done.stderr
    assert "accuracy_normalised" in done.stdout
    assert "rouge_l" not in done.stdout
    assert "noise on activations: no noise: none" in done.stdout


def test_mistakes_have_their_exit_codes_and_name_the_line(
    served: tuple[CliWorld, str, Path],
) -> None:
    world, address, folder = served
    wrong = _write(folder, ITEMS[0], {**ITEMS[1], "answer": 3})
    done = _eval(world, address, "--tasks", wrong)
    assert done.returncode == 5
    assert f"{wrong}:2: answer 3" in done.stderr
    done = _eval(world, address, "--tasks", _write(folder, ITEMS[0]), "--out", folder / "no" / "x")
    assert done.returncode == 2
    assert "cannot write predictions" in done.stderr


def test_predictions_of_a_published_task_get_its_official_score(
    served: tuple[CliWorld, str, Path],
) -> None:
    world, address, folder = served
    fields = ("story", "history", "question")
    asked = [
        Question(key=text, fields=dict.fromkeys(fields, text), answers=(text,))
        for text in ("one", "two", "three")
    ]
    about = Provenance(source="made up", is_demo_scale=True)
    task = write_task("coqa", [], asked, folder / "coqa", Form.CHAT, about)
    out = task.folder / "predictions.jsonl"
    done = _eval(world, address, "--tasks", task.test, "--out", out, "--json")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    questions = open_task(task.folder).questions()
    scored = published_task("coqa").score(questions, predictions_of(out, questions))
    # Of one annotator, ours and the official score are the same number.
    assert scored.metrics["f1"] == pytest.approx(result["metrics"]["f1"]["mean"])
    assert len(scored.items["f1"]) == len(asked)
