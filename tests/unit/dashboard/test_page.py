"""The page beside a server that `cutlayer serve` runs."""

from pathlib import Path

import pytest

from cutlayer.cli.output import Output
from cutlayer.cli.page import serving_page
from cutlayer.dashboard.fetch import fetch_state
from cutlayer.errors import TransportError
from cutlayer.server.settings import ServerSettings
from cutlayer.settings import parse_settings
from cutlayer.web.auth import read_token
from tests.unit.dashboard.server_world import StandInFederation, StandInServer
from tests.unit.dashboard.store_world import new_store


def _settings(folder: Path, **more: object) -> ServerSettings:
    table = {
        "model": {"path": "m", "lower": 1, "upper": 2},
        "listen": {"address": "127.0.0.1:0", "plaintext": True},
        "state": {"folder": str(folder)},
    }
    return parse_settings(ServerSettings, table | more, "test")


def test_the_page_lives_as_long_as_the_server(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = _settings(tmp_path, http={"address": "127.0.0.1:0"})
    with new_store(tmp_path / "store") as store:
        federation = StandInFederation(store)
        with serving_page(StandInServer(), federation, settings, Output(False)) as page:
            assert page is not None
            token = read_token(tmp_path / "http.token")
            state = fetch_state(page.url, token)
    assert state.server.federation is not None
    assert state.server.federation.name == "reviews"
    assert page.url in capsys.readouterr().out
    with pytest.raises(TransportError):
        fetch_state(page.url, token)


def test_a_server_without_the_section_has_no_page(tmp_path: Path) -> None:
    with serving_page(StandInServer(), None, _settings(tmp_path), Output(False)) as page:
        assert page is None
    assert not list(tmp_path.iterdir())
