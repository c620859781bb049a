"""A split run of the suite and its unsplit counterpart learn and answer alike.

The counterpart is a script of transformers and PEFT alone: it makes its own tokens, batches, losses
and replies.
"""

from pathlib import Path

import msgspec
import numpy as np
import pytest

from cutlayer.evaluation.published.question import Question
from cutlayer.evaluation.published.task_files import Provenance, TaskFolder, write_task
from cutlayer.evaluation.published.templates import Form, Template
from cutlayer.suite import central
from cutlayer.suite.central import run_central
from cutlayer.suite.centralised import __main__ as script
from cutlayer.suite.result import Figures
from cutlayer.suite.spec import Method, RunSpec
from cutlayer.suite.split import run_split
from tests.tiny_models import tiny_llama_folder, tiny_model
from tests.unit.suite.tiny_tasks import CHOICES, ONE_THREAD, tiny_spec

_LOSSES = 1e-5
"""Relative; the promise is 1e-4."""
_WORDS = Template(
    prompt="{text}:", choices={"entailment": "yes", "not_entailment": "no"}, stop=("!", "\n")
)
_ONE_TOKEN = Template(prompt="{text}:", choices={"entailment": "y", "not_entailment": "n"})


@pytest.fixture
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same script without a process, which takes seconds to start."""

    def run(folder: Path, threads: int) -> None:
        script.main([str(folder / "request.json"), str(folder / "response.json")])

    monkeypatch.setattr(central, "_run_script", run)


def test_a_script_of_its_own_process_learns_and_chooses_alike(tmp_path: Path) -> None:
    task = _choices(tmp_path / "task", Form.PLAIN, _WORDS)
    spec = tiny_spec(tiny_llama_folder(tmp_path), Method.SPLIT)
    split, unsplit = _both(spec, task, tmp_path)
    _assert_same_losses(split, unsplit)
    _assert_same_choices(split, unsplit)


@pytest.mark.usefixtures("in_this_process")
@pytest.mark.parametrize("adapter", ["lora", "prefix"])
def test_choices_of_a_chat_have_the_same_likelihoods(tmp_path: Path, adapter: str) -> None:
    task = _choices(tmp_path / "task", Form.CHAT, _WORDS)
    spec = tiny_spec(tiny_llama_folder(tmp_path), Method.SPLIT, adapter=adapter)
    split, unsplit = _both(spec, task, tmp_path)
    _assert_same_losses(split, unsplit)
    _assert_same_choices(split, unsplit)


@pytest.mark.usefixtures("in_this_process")
@pytest.mark.parametrize("family", ["qwen3", "gemma2", "gpt_neox"])
def test_choices_of_one_token_have_the_same_likelihoods(tmp_path: Path, family: str) -> None:
    task = _choices(tmp_path / "task", Form.PLAIN, _ONE_TOKEN)
    model, _ = tiny_model(family, tmp_path)
    split, unsplit = _both(tiny_spec(model, Method.SPLIT), task, tmp_path)
    _assert_same_losses(split, unsplit)
    _assert_same_choices(split, unsplit)


@pytest.mark.usefixtures("in_this_process")
@pytest.mark.parametrize("adapter", ["lora", "prefix"])
def test_replies_are_the_same_texts(tmp_path: Path, adapter: str) -> None:
    task = _replies(tmp_path / "task")
    spec = tiny_spec(tiny_llama_folder(tmp_path), Method.SPLIT, adapter=adapter, steps=6)
    split, unsplit = _both(spec, task, tmp_path)
    _assert_same_losses(split, unsplit)
    texts = [answer.text for answer in unsplit.predictions]
    assert [answer.text for answer in split.predictions] == texts
    # Something was learnt, and what is compared is not the same empty text over and over.
    assert any(texts)


def _both(spec: RunSpec, task: TaskFolder, folder: Path) -> tuple[Figures, Figures]:
    unsplit = msgspec.structs.replace(spec, method=Method.CENTRALISED)
    return (
        run_split(spec, task, folder / "split", ONE_THREAD, None),
        run_central(unsplit, task, folder / "central", ONE_THREAD, None),
    )


def _assert_same_losses(split: Figures, unsplit: Figures) -> None:
    assert split.losses[-1] < split.losses[0]
    assert len(split.losses) == len(unsplit.losses)
    np.testing.assert_allclose(split.losses, unsplit.losses, rtol=_LOSSES)
    assert split.num_train_tokens == unsplit.num_train_tokens


def _assert_same_choices(split: Figures, unsplit: Figures) -> None:
    ours = [answer.log_likelihoods for answer in split.predictions]
    theirs = [answer.log_likelihoods for answer in unsplit.predictions]
    np.testing.assert_allclose(ours, theirs, atol=1e-4)
    assert [a.text for a in split.predictions] == [a.text for a in unsplit.predictions]


def _choices(folder: Path, form: Form, words: Template) -> TaskFolder:
    rows = [
        Question(
            key=str(number),
            fields={"text": "ab" * (1 + number % 5) + "yn"[number % 2]},
            choices=CHOICES,
            answers=(CHOICES[number % 2],),
        )
        for number in range(30)
    ]
    return _written("rte", rows, folder, form, words)


def _replies(folder: Path) -> TaskFolder:
    rows = [
        Question(
            key=str(number),
            group="story",
            fields={"text": "ab" * (1 + number % 5)},
            answers=(("cd!", "dcd")[number % 2],),
        )
        for number in range(30)
    ]
    return _written("coqa", rows, folder, Form.PLAIN, _WORDS)


def _written(
    name: str, rows: list[Question], folder: Path, form: Form, words: Template
) -> TaskFolder:
    about = Provenance(source="packaged", is_demo_scale=True)
    return write_task(name, rows[:24], rows[24:], folder, form, about, words)
