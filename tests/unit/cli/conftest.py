"""One tiny model for all tests of the commands. It starts no server."""

from pathlib import Path

import pytest

from tests.tiny_models import tiny_llama_folder
from tests.unit.cli.cli_world import CliWorld, make_world


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama_folder(tmp_path_factory.mktemp("model"))


@pytest.fixture
def world(model: Path, tmp_path: Path) -> CliWorld:
    return make_world(model, tmp_path)
