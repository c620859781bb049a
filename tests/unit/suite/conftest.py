"""A tiny model and a made-up task, for whoever asks for them."""

from pathlib import Path

import pytest

from cutlayer.evaluation.published.task_files import TaskFolder
from tests.tiny_models import tiny_llama_folder
from tests.unit.suite.tiny_tasks import tiny_task


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama_folder(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> TaskFolder:
    return tiny_task(tmp_path_factory.mktemp("task"))
