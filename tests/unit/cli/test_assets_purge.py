"""Assets and purge, without any network."""

from pathlib import Path

import pytest

from cutlayer.data.assets import ASSETS
from cutlayer.model.manifest import read_manifest
from tests.unit.cli.cli_world import run_command


def test_list_names_every_asset_and_its_terms(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ran = run_command(capsys, "assets", "list", "--cache", tmp_path, "--json")
    assets = ran.result["assets"]
    assert isinstance(assets, list)
    assert [asset["name"] for asset in assets] == list(ASSETS)
    assert not any(asset["cached"] for asset in assets)


def test_fetching_an_unknown_asset_names_the_known_ones(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ran = run_command(capsys, "assets", "fetch", "smollm3", "--cache", tmp_path)
    assert ran.code == 2
    assert "smollm2" in ran.err


def test_manifest_writes_the_digest_that_it_prints(
    model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ran = run_command(capsys, "assets", "manifest", model, "--json")
    assert ran.result["digest"] == read_manifest(model).root()


def test_purge_refuses_a_folder_that_is_no_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    ran = run_command(capsys, "purge", tmp_path, "--yes", "--json")
    assert ran.code == 6
    assert ran.result["error"] == "StorageError"
    assert (tmp_path / "thesis.tex").exists()
