"""A suite of real runs on a tiny model: interrupted, resumed, with a run that fails, reported."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from msgspec.structs import replace

from cutlayer.cli.main import run
from cutlayer.suite.compute import Compute
from cutlayer.suite.run import SuiteOptions, run_suite
from cutlayer.suite.spec import Method, RunSpec, Sizes
from cutlayer.suite.store import Store
from tests.leftovers import child_processes
from tests.tiny_models import tiny_model

SIZES = Sizes(train_rows=4, test_rows=4, steps=2, rows_per_step=2, micro_batch_rows=2, lr=1e-3)
OPTIONS = SuiteOptions(compute=Compute(threads=1), command="cutlayer eval suite --profile tiny")
SECRET = "heron"


@pytest.fixture(scope="module")
def spec(tmp_path_factory: pytest.TempPathFactory) -> RunSpec:
    """A split run over original files of RTE that we made up."""
    folder = tmp_path_factory.mktemp("rte")
    for name in ("train", "val"):
        (folder / f"{name}.jsonl").write_text("".join(_line(number) for number in range(4)))
    model, _ = tiny_model("llama", tmp_path_factory.mktemp("model"), max_position_embeddings=512)
    return RunSpec(
        task="rte",
        method=Method.SPLIT,
        seed=0,
        sizes=SIZES,
        source=str(folder),
        model=str(model),
        head_blocks=1,
        tail_blocks=1,
    )


def _line(number: int) -> str:
    row = {
        "premise": f"The {SECRET} has {number} eggs.",
        "hypothesis": "It has eggs.",
        "label": "entailment" if number % 2 else "not_entailment",
        "idx": number,
    }
    return json.dumps(row) + "\n"


def _interrupt_at(words: str, lines: list[str]) -> Callable[[str], None]:
    def say(line: str) -> None:
        lines.append(line)
        if words in line:
            raise KeyboardInterrupt

    return say


def _files(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.rglob("*") if p.is_file())


def test_a_suite_is_interrupted_resumed_and_keeps_what_failed(
    spec: RunSpec, tmp_path: Path
) -> None:
    nowhere = replace(spec, source=str(tmp_path))
    specs, store, lines = [nowhere, spec], Store(tmp_path / "store"), list[str]()

    with pytest.raises(KeyboardInterrupt):
        run_suite(specs, store, OPTIONS, _interrupt_at("2 of 2", lines))
    assert child_processes() == []
    assert _files(store.folder) == [
        ".lock",
        f"{nowhere.run_id}.json",
        f"{nowhere.run_id}.log",
    ]

    results = run_suite(specs, Store(store.folder), OPTIONS, lines.append)
    assert "FAILED: DataError" in lines[1]
    failed, done = Store(store.folder).get(nowhere), Store(store.folder).get(spec)
    assert results == [failed, done]
    assert failed is not None
    assert failed.error is not None
    assert failed.error.startswith("DataError: ")
    assert done is not None
    assert done.error is None
    assert len(done.losses) == SIZES.steps
    assert len(done.items["accuracy"]) == SIZES.test_rows
    assert done.bytes_up > 0
    assert done.origin.command.endswith(f"--profile tiny --only {spec.run_id}")

    lines.clear()
    again = run_suite([spec], Store(store.folder), OPTIONS, lines.append)
    assert (again, lines) == ([done], ["1 of 1 runs were done before"])
    kept = b"".join(p.read_bytes() for p in store.folder.rglob("*") if p.is_file())
    assert SECRET.encode() not in kept

    assert run(["eval", "report", str(store.folder)]) == 0
    page = (store.folder / "report.md").read_text()
    assert done.origin.command in page
    assert nowhere.run_id in page
    assert "fetch the original files" in page
