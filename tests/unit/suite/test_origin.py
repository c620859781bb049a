"""Where a number comes from."""

import subprocess
from pathlib import Path

import pytest

from cutlayer.suite.origin import commit_of, origin_of


def _git(folder: Path, *words: str) -> str:
    identity = ("-c", "user.name=a", "-c", "user.email=a@example.org")
    return subprocess.run(
        ["git", *identity, *words], cwd=folder, check=True, capture_output=True, text=True
    ).stdout.strip()


@pytest.fixture
def package(tmp_path: Path) -> Path:
    folder = tmp_path / "checkout" / "package"
    folder.mkdir(parents=True)
    (folder / "code.py").write_text("x = 1\n")
    _git(folder.parent, "init", "--quiet")
    _git(folder.parent, "add", "package")
    _git(folder.parent, "commit", "--quiet", "-m", "First")
    return folder


def test_a_clean_checkout_has_its_commit(package: Path) -> None:
    commit = _git(package, "rev-parse", "HEAD")
    (package.parent / "notes.txt").write_text("not of the package")
    assert commit_of(package) == commit


@pytest.mark.parametrize("name", ["code.py", "new.py"])
def test_changed_and_new_files_make_it_dirty(package: Path, name: str) -> None:
    (package / name).write_text("x = 2\n")
    assert commit_of(package) == _git(package, "rev-parse", "HEAD") + "-dirty"


def test_files_that_git_does_not_know_have_no_commit(package: Path, tmp_path: Path) -> None:
    installed = package.parent / "environment" / "package"
    installed.mkdir(parents=True)
    (installed / "code.py").write_text("x = 1\n")
    assert commit_of(installed) == "unknown"
    assert commit_of(tmp_path) == "unknown"


def test_versions_and_machine_are_named() -> None:
    origin = origin_of("make evaluate", 2, "2026-01-01T00:00:00+00:00")
    assert set(origin.versions) == {"python", "torch", "transformers", "peft", "cutlayer"}
    assert "unknown" not in origin.versions.values()
    assert "2 threads" in origin.machine
    assert origin.command == "make evaluate"
