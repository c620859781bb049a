"""One owner and a server: what a run leaves, and what cannot be run."""

from pathlib import Path

import msgspec
import pytest

from cutlayer.errors import ConfigError, DataError
from cutlayer.evaluation.published.task_files import TaskFolder
from cutlayer.suite.result import Figures
from cutlayer.suite.sides import CLIPS, privacy_settings
from cutlayer.suite.spec import Method, RunSpec
from cutlayer.suite.split import run_split
from tests.unit.suite.tiny_tasks import ONE_THREAD, SIZES, tiny_replies, tiny_spec, tiny_task


@pytest.fixture
def spec(model: Path) -> RunSpec:
    return tiny_spec(model, Method.SPLIT)


@pytest.fixture(scope="module")
def figures(model: Path, task: TaskFolder, tmp_path_factory: pytest.TempPathFactory) -> Figures:
    """Of the plain run."""
    spec = tiny_spec(model, Method.SPLIT)
    return run_split(spec, task, tmp_path_factory.mktemp("plain") / "work", ONE_THREAD, None)


def test_a_run_learns_and_says_what_it_cost(figures: Figures) -> None:
    assert len(figures.losses) == SIZES.steps
    assert figures.losses[-1] < figures.losses[0]
    assert figures.bytes_up > 4 * 32 * figures.num_train_tokens
    assert figures.bytes_down > 4 * 32 * figures.num_train_tokens
    assert figures.guarantee == "no noise: none"
    assert figures.peak_client_bytes is None
    assert figures.train_seconds > 0
    assert figures.score_seconds > 0


def test_predictions_are_choices_in_the_order_of_the_keys(
    figures: Figures, task: TaskFolder
) -> None:
    for question, prediction in zip(task.questions(), figures.predictions, strict=True):
        place = prediction.log_likelihoods.index(max(prediction.log_likelihoods))
        assert prediction.text == question.choices[place]


def test_replies_are_predictions_without_likelihoods(model: Path, tmp_path: Path) -> None:
    task = tiny_replies(tmp_path / "task")
    spec = tiny_spec(model, Method.SPLIT, lr=0.03, steps=8)
    predictions = run_split(spec, task, tmp_path / "work", ONE_THREAD, None).predictions
    assert [prediction.log_likelihoods for prediction in predictions] == [(), ()]
    assert all(prediction.text for prediction in predictions)


def test_a_codec_of_two_bytes_sends_less(
    figures: Figures, spec: RunSpec, task: TaskFolder, tmp_path: Path
) -> None:
    short = msgspec.structs.replace(spec, codec="bf16")
    bf16 = run_split(short, task, tmp_path / "bf16", ONE_THREAD, None)
    assert bf16.bytes_up < 0.8 * figures.bytes_up
    assert bf16.losses != figures.losses


@pytest.mark.parametrize("adapter", ["prefix", "sparse"])
def test_other_kinds_of_adapters_train_too(
    spec: RunSpec, task: TaskFolder, tmp_path: Path, adapter: str
) -> None:
    other = msgspec.structs.replace(spec, adapter=adapter)
    trained = run_split(other, task, tmp_path / "work", ONE_THREAD, None)
    assert trained.losses[-1] != trained.losses[0]


def test_a_mechanism_that_clips_gets_its_documented_bound(spec: RunSpec) -> None:
    for mechanism, clip in CLIPS.items():
        clipped = msgspec.structs.replace(spec, mechanism=mechanism, scale=0.1)
        assert privacy_settings(clipped).clip == clip
    plain = msgspec.structs.replace(spec, mechanism="gaussian", scale=0.1)
    assert privacy_settings(plain).clip is None


def test_noise_shows_in_losses_and_in_the_guarantee(
    figures: Figures, spec: RunSpec, task: TaskFolder, tmp_path: Path
) -> None:
    noisy = msgspec.structs.replace(spec, mechanism="gaussian", scale=0.5)
    with_noise = run_split(noisy, task, tmp_path / "noisy", ONE_THREAD, None)
    assert with_noise.guarantee == "no guarantee (unclipped)"
    assert with_noise.losses != figures.losses


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mechanism": "gauss"}, "unknown"),
        ({"mechanism": "gaussian"}, "needs a scale"),
        ({"head_blocks": 3}, "leave no trunk"),
        ({"adapter": "full"}, "unknown"),
        ({"codec": "zip"}, "zip"),
    ],
)
def test_what_cannot_be_run_is_refused_before_work(
    spec: RunSpec, task: TaskFolder, tmp_path: Path, changes: dict[str, object], message: str
) -> None:
    wrong = msgspec.structs.replace(spec, **changes)
    with pytest.raises(ConfigError, match=message):
        run_split(wrong, task, tmp_path / "work", ONE_THREAD, None)
    assert not (tmp_path / "work" / "run").exists()


def test_a_test_file_that_lost_a_line_is_refused_before_training(
    spec: RunSpec, tmp_path: Path
) -> None:
    task = tiny_task(tmp_path / "task")
    task.test.write_bytes(b"".join(task.test.read_bytes().splitlines(keepends=True)[:-1]))
    with pytest.raises(DataError, match="3 items for 4 keys"):
        run_split(spec, task, tmp_path / "work", ONE_THREAD, None)
    assert not (tmp_path / "work").exists()
