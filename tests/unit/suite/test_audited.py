"""An audit of the suite finds what leaves in the open, and less of what noise covers."""

from pathlib import Path

import msgspec
import pytest

from cutlayer.evaluation.published.task_files import TaskFolder
from cutlayer.suite import audited
from cutlayer.suite.audited import run_audited
from cutlayer.suite.spec import Method, RunSpec
from tests.unit.suite.tiny_tasks import ONE_THREAD, tiny_spec


@pytest.fixture
def spec(model: Path, monkeypatch: pytest.MonkeyPatch) -> RunSpec:
    monkeypatch.setattr(audited, "SECONDS", 3.0)
    return tiny_spec(model, Method.AUDIT)


def test_without_noise_all_is_recovered(spec: RunSpec, task: TaskFolder, tmp_path: Path) -> None:
    figures = run_audited(spec, task, tmp_path / "work", ONE_THREAD, None)
    assert figures.recovery is not None
    assert figures.recovery > 0.9
    assert figures.predictions == ()
    assert figures.guarantee == "no noise: none"


def test_much_noise_leaves_little(spec: RunSpec, task: TaskFolder, tmp_path: Path) -> None:
    noisy = msgspec.structs.replace(spec, mechanism="gaussian", scale=50.0)
    figures = run_audited(noisy, task, tmp_path / "work", ONE_THREAD, None)
    assert figures.recovery is not None
    assert figures.recovery < 0.7
    assert figures.guarantee == "no guarantee (unclipped)"
