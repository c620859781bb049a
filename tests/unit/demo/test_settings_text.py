"""Settings written as text are read back as they were."""

from pathlib import Path

from cutlayer.client.settings import ClientSettings
from cutlayer.demo.settings_text import settings_text
from cutlayer.settings import load_settings, settings_digest
from tests.worlds import client_settings


def test_text_that_was_written_loads_equal_settings(tmp_path: Path) -> None:
    odd = {"sampling__stop": ('"\n', "\\", "ß😀"), "privacy__mechanism": "none"}
    settings = client_settings(tmp_path / 'a "model"', tmp_path, **odd)
    path = tmp_path / "settings.toml"
    path.write_text(settings_text(settings), encoding="utf-8")
    again = load_settings(ClientSettings, path)
    assert again == settings
    assert settings_digest(again) == settings_digest(settings)


def test_every_line_is_an_override(tmp_path: Path) -> None:
    settings = client_settings(tmp_path / "model", tmp_path)
    empty = tmp_path / "empty.toml"
    empty.write_text("")
    lines = settings_text(settings).splitlines()
    assert load_settings(ClientSettings, empty, lines) == settings
