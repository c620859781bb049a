"""What runs inside: nothing that knows owners' data, and only files that are there."""

import ast
from pathlib import Path

import pytest

import cutlayer.enclave
from cutlayer.errors import ConfigError
from tests.enclave_worlds import enclave_settings

INSIDE = ("connection", "desk", "few", "inner_part", "row_store", "server", "settings")
OWNERS = {
    "feeding",
    "front",
    "generation",
    "owner",
    "owner_settings",
    "placement_view",
    "remote",
    "step",
}


def _imports(path: Path) -> set[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}


@pytest.mark.parametrize("name", INSIDE)
def test_the_measured_side_imports_nothing_of_an_owner(name: str) -> None:
    (folder,) = cutlayer.enclave.__path__
    for imported in _imports(Path(folder) / f"{name}.py"):
        room, _, module = imported.removeprefix("cutlayer.").partition(".")
        assert room not in ("client", "data", "privacy"), imported
        assert room != "enclave" or module not in OWNERS, imported


def test_every_module_is_on_one_side() -> None:
    (folder,) = cutlayer.enclave.__path__
    names = {path.stem for path in Path(folder).glob("*.py")} - {"__init__"}
    assert names == set(INSIDE) | OWNERS


def test_a_confined_process_reads_the_model_and_writes_the_state(
    tmp_path: Path, model: Path
) -> None:
    settings = enclave_settings(model, tmp_path, process={"lock_memory": False})
    settings.state.folder.mkdir()
    confined = settings.confinement()
    assert confined is not None
    assert model in confined.readable
    assert confined.writable == [settings.state.folder]


def test_a_confined_process_does_not_fetch_a_model(tmp_path: Path) -> None:
    settings = enclave_settings(Path("nobody/model"), tmp_path, process={})
    with pytest.raises(ConfigError, match="fetches nothing"):
        settings.confinement()
