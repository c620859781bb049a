"""One value for one set of files: dates, order and compiled files do not count, bytes do."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from cutlayer.errors import ConfigError
from cutlayer.tee.measure import measure_folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "code"
    (path / "inner").mkdir(parents=True)
    (path / "a.py").write_text("a = 1\n")
    (path / "inner/b.json").write_text("{}")
    return path


def test_a_copy_measures_the_same(folder: Path, tmp_path: Path) -> None:
    before = measure_folder(folder)
    shutil.copytree(folder, tmp_path / "copy")
    (folder / "a.py").touch()
    (folder / "__pycache__").mkdir()
    (folder / "__pycache__/a.pyc").write_bytes(b"compiled")
    os.chmod(folder / "a.py", 0o755)
    assert measure_folder(folder) == measure_folder(tmp_path / "copy") == before
    assert len(before) == 48


@pytest.mark.parametrize(
    "change",
    [
        lambda f: (f / "a.py").write_text("a = 2\n"),
        lambda f: (f / "a.py").rename(f / "c.py"),
        lambda f: (f / "inner/b.json").unlink(),
        lambda f: (f / "new").write_text(""),
        # Importable without a source.
        lambda f: (f / "new.pyc").write_bytes(b""),
        # The same bytes, cut between the files elsewhere.
        lambda f: [(f / "a.py").write_text("a = 1\n{}"), (f / "inner/b.json").write_text("")],
    ],
)
def test_any_change_of_files_is_another_measurement(
    folder: Path, change: Callable[[Path], object]
) -> None:
    before = measure_folder(folder)
    change(folder)
    assert measure_folder(folder) != before


def test_what_would_not_be_measured_is_refused(folder: Path) -> None:
    (folder / "linked").symlink_to(folder / "inner")
    with pytest.raises(ConfigError, match="linked is a link to a folder"):
        measure_folder(folder)


def test_a_missing_folder_is_named(folder: Path) -> None:
    with pytest.raises(ConfigError, match="cannot measure"):
        measure_folder(folder / "none")
