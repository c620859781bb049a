"""One tiny model for all tests of this folder; nobody changes it."""

from pathlib import Path

import pytest

from tests.tiny_models import tiny_llama_folder


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama_folder(tmp_path_factory.mktemp("model"))
