"""The demo's attested scene with both sides as processes, on a tiny model and made-up articles."""

from pathlib import Path

import pytest

from benchmarks.subjects import write_text_llama
from cutlayer.data.topics import TOPICS
from cutlayer.demo.attested import run_attested
from cutlayer.demo.run import DemoInputs
from cutlayer.demo.setup import DemoSize
from cutlayer.storage.files import private_folder
from cutlayer.tee.refusal import Refusal


@pytest.fixture
def inputs(tmp_path: Path) -> DemoInputs:
    for topic in TOPICS:
        (tmp_path / "articles" / topic).mkdir(parents=True)
        for number in range(4):
            text = f"{topic} {number}\nwhat happened in {topic} on day {number}"
            (tmp_path / "articles" / topic / f"{number}.txt").write_text(text)
    return DemoInputs(
        model=write_text_llama(tmp_path / "model"),
        articles=tmp_path / "articles",
        folder=private_folder(tmp_path / "demo"),
        size=DemoSize(num_train=10, num_heldout=5, lower=1, blocks_in_tail=1, threads=1),
    )


def test_one_policy_is_satisfied_and_nothing_leaves_under_the_others(inputs: DemoInputs):
    said: list[str] = []
    report = run_attested(inputs, said.append)
    assert report.assurance == "SIMULATED"
    assert any("SIMULATED" in line for line in said)
    assert report.training["step"] == 2
    assert [one.refusal for one in report.refused] == [
        Refusal.WRONG_MEASUREMENT,
        Refusal.WRONG_ROOT,
    ]
    assert [one.bytes_sent for one in report.refused] == [0, 0]
