"""`cutlayer status` against a page that is being served, and against what is none."""

import json
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread

import pytest

from cutlayer.cli.federation_tables import printable
from cutlayer.cli.main import run
from cutlayer.dashboard.fetch import fetch_state
from cutlayer.dashboard.serve import Dashboard, start_dashboard
from cutlayer.errors import (
    ConfigError,
    CutlayerError,
    PermissionRefused,
    ProtocolError,
    TransportError,
)
from cutlayer.web.auth import ensure_token, read_token
from cutlayer.web.settings import HttpSettings
from tests.unit.dashboard.stand_in import StandInView, snapshot, without_federation

TOKEN = "t" * 40


@pytest.fixture
def view() -> StandInView:
    return StandInView()


@pytest.fixture
def dashboard(view: StandInView, tmp_path: Path) -> Iterator[Dashboard]:
    served = start_dashboard(view, HttpSettings(address="127.0.0.1:0"), tmp_path)
    yield served
    served.stop()


def _status(dashboard: Dashboard, *more: str) -> int:
    return run(["status", "--url", dashboard.url, "--token-file", str(dashboard.token_file), *more])


def test_one_screen_shows_what_the_page_shows(
    dashboard: Dashboard, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _status(dashboard) == 0
    shown = capsys.readouterr().out
    for text in (
        "reviews: fedavg, secure aggregation on",
        "7 of 20, attempt 2: members train and send their updates",
        "waiting for  amazon",
        "straggler",
        "3 of 4",
        "1,234,567 in all",
        "2.5 GB up",
        "replica 1",
    ):
        assert text in shown
    assert len(shown.splitlines()) < 50


def test_a_server_without_a_federation_has_no_rounds(
    dashboard: Dashboard, view: StandInView, capsys: pytest.CaptureFixture[str]
) -> None:
    view.state = without_federation()
    assert _status(dashboard) == 0
    shown = capsys.readouterr().out
    assert "round" not in shown
    assert "4 connections" in shown


def test_json_is_the_pages_own_state(
    dashboard: Dashboard, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _status(dashboard, "--json") == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["server"]["federation"]["members"][3]["status"] == "straggler"
    assert set(result) == {"server", "rates"}


def test_a_name_cannot_steer_the_terminal(
    dashboard: Dashboard, view: StandInView, capsys: pytest.CaptureFixture[str]
) -> None:
    view.state = snapshot(hostile=True)
    assert _status(dashboard) == 0
    shown = capsys.readouterr().out
    assert "\u202e" not in shown
    assert "\x1b]0;" not in shown
    assert printable("a\x1b]0;title\x07\u202eb") == "a\ufffd]0;title\ufffd\ufffdb"


def test_another_servers_token_is_refused_with_code_9(
    dashboard: Dashboard, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other.token"
    ensure_token(other)
    assert run(["status", "--url", dashboard.url, "--token-file", str(other)]) == 9
    assert "refuses the token" in capsys.readouterr().err
    with pytest.raises(PermissionRefused):
        fetch_state(dashboard.url, read_token(other))


def test_a_server_that_cannot_tell_its_state_says_why(
    dashboard: Dashboard, view: StandInView, capsys: pytest.CaptureFixture[str]
) -> None:
    view.is_broken = True
    assert _status(dashboard) == 7
    assert "no space left" in capsys.readouterr().err


@pytest.mark.parametrize(
    "url", ["", "127.0.0.1:80", "ftp://127.0.0.1", "http://", "http://[", "http://me:pw@127.0.0.1/"]
)
def test_an_address_that_is_none_is_refused(url: str) -> None:
    with pytest.raises(ConfigError, match="no address of a page"):
        fetch_state(url, TOKEN)


def test_the_token_never_goes_out_in_the_clear() -> None:
    with pytest.raises(ConfigError, match="use https"):
        fetch_state("http://trunk.example.org:7445", TOKEN)


def test_nobody_there_is_said_with_what_to_do() -> None:
    with pytest.raises(TransportError, match="is the server running"):
        fetch_state("http://127.0.0.1:1", TOKEN)


class _Other(BaseHTTPRequestHandler):
    """Some other program: its path says what it does."""

    seen: list[str] = []  # noqa: RUF012

    def do_GET(self) -> None:
        """Redirect, fail, or talk about something else."""
        self.seen.append(self.path)
        answers = {"/moved": 302, "/gone": 404}
        self.send_response(answers.get(self.path.removesuffix("/api/state"), 200))
        self.send_header("Location", "/elsewhere")
        self.end_headers()
        self.wfile.write(b'{"server": {"software": "other"}}')

    def log_message(self, format: str, *args: object) -> None:
        """Quiet."""


@pytest.fixture
def other() -> Iterator[str]:
    http = HTTPServer(("127.0.0.1", 0), _Other)
    thread = Thread(target=http.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{http.server_port}"
    http.shutdown()
    thread.join()
    http.server_close()


@pytest.mark.parametrize("path", ["", "/moved", "/gone"])
def test_another_program_is_told_from_a_page(path: str, other: str) -> None:
    with pytest.raises(ProtocolError, match=r"check the address|no page of a cutlayer server"):
        fetch_state(other + path, TOKEN)
    assert "/elsewhere" not in _Other.seen


def test_the_environments_proxy_does_not_get_the_token(
    dashboard: Dashboard, other: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("http_proxy", other)
    monkeypatch.delenv("no_proxy", raising=False)
    _Other.seen.clear()
    try:
        fetch_state(dashboard.url, read_token(dashboard.token_file))
    except CutlayerError as error:
        pytest.fail(f"went through the proxy: {error}")
    assert not _Other.seen
