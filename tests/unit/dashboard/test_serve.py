"""The page's server: where it listens, what it refuses, and how it ends."""

import socket
import ssl
import threading
import urllib.request
from pathlib import Path

import pytest

from cutlayer.cli.main import run
from cutlayer.dashboard.fetch import fetch_state
from cutlayer.dashboard.serve import Dashboard, start_dashboard
from cutlayer.errors import ConfigError, StorageError, TransportError
from cutlayer.identity.provision import local, member_files
from cutlayer.settings import parse_settings
from cutlayer.web.auth import read_token
from cutlayer.web.settings import HttpSettings
from tests.unit.dashboard.stand_in import StandInView

LOOPBACK = {"address": "127.0.0.1:0"}


def _settings(**table: object) -> HttpSettings:
    return parse_settings(HttpSettings, LOOPBACK | table, "test page")


def _get(dashboard: Dashboard, path: str) -> bytes:
    with urllib.request.urlopen(dashboard.url + path, timeout=10) as answer:
        body = answer.read()
    assert isinstance(body, bytes)
    return body


def test_the_page_answers_from_start_to_stop_and_leaves_nothing(tmp_path: Path) -> None:
    before = threading.active_count()
    dashboard = start_dashboard(StandInView(), _settings(), tmp_path)
    try:
        assert _get(dashboard, "/healthz") == b"ok\n"
        assert dashboard.token_file == tmp_path / "http.token"
    finally:
        dashboard.stop()
    with pytest.raises(OSError):
        _get(dashboard, "/healthz")
    assert threading.active_count() == before


def test_a_restart_keeps_the_token_and_may_use_the_same_port(tmp_path: Path) -> None:
    first = start_dashboard(StandInView(), _settings(), tmp_path)
    token = read_token(first.token_file)
    fetch_state(first.url, token)
    first.stop()
    address = f"127.0.0.1:{first.port}"
    second = start_dashboard(StandInView(), _settings(address=address), tmp_path)
    assert read_token(second.token_file) == token
    second.stop()


def test_the_token_file_may_lie_elsewhere(tmp_path: Path) -> None:
    path = tmp_path / "secrets" / "page"
    dashboard = start_dashboard(StandInView(), _settings(token_file=str(path)), tmp_path)
    dashboard.stop()
    assert dashboard.token_file == path
    assert not (tmp_path / "http.token").exists()


def test_a_taken_port_is_said_before_anything_starts(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(ConfigError, match="in use; choose another"):
            start_dashboard(StandInView(), _settings(address=address), tmp_path)


def test_a_token_that_others_may_read_keeps_the_page_shut(tmp_path: Path) -> None:
    (tmp_path / "http.token").write_text("t" * 40)
    (tmp_path / "http.token").chmod(0o644)
    with pytest.raises(StorageError, match="chmod 600"):
        start_dashboard(StandInView(), _settings(), tmp_path)


@pytest.mark.parametrize("address", ["0.0.0.0:0", "[::]:0", "10.1.2.3:80", "trunk.example.org:80"])
def test_plain_http_beyond_loopback_is_refused(address: str) -> None:
    with pytest.raises(ConfigError, match="plaintext_behind_proxy=true where a proxy adds HTTPS"):
        _settings(address=address)
    assert _settings(address=address, plaintext_behind_proxy=True).is_encrypted


@pytest.mark.parametrize("address", ["127.0.0.1", ":80", "127.0.0.1:99999", "127.0.0.1:web"])
def test_an_address_that_is_none_is_refused(address: str) -> None:
    with pytest.raises(ConfigError, match="host:port"):
        _settings(address=address)


def test_https_works_with_a_certificate_of_the_federation(tmp_path: Path) -> None:
    local(tmp_path / "keys")
    files = member_files(tmp_path / "keys" / "server")
    tls = {"certificate": str(files.certificate), "key": str(files.key)}
    dashboard = start_dashboard(StandInView(), _settings(tls=tls), tmp_path)
    try:
        token = read_token(dashboard.token_file)
        assert dashboard.url.startswith("https://127.0.0.1:")
        state = fetch_state(dashboard.url, token, files.authority)
        assert state.server.is_ready
        with pytest.raises(TransportError, match="CERTIFICATE_VERIFY_FAILED"):
            fetch_state(dashboard.url, token)
        plain = ssl.create_default_context(cafile=files.authority)
        assert plain.verify_mode is ssl.CERT_REQUIRED
    finally:
        dashboard.stop()


def test_files_that_are_no_certificate_are_refused(tmp_path: Path) -> None:
    for name in ("certificate.pem", "key.pem"):
        (tmp_path / name).write_text("nothing")
    tls = {"certificate": str(tmp_path / "certificate.pem"), "key": str(tmp_path / "key.pem")}
    with pytest.raises(ConfigError, match=r"http\.tls"):
        start_dashboard(StandInView(), _settings(tls=tls), tmp_path)
    with pytest.raises(ConfigError, match="both set"):
        _settings(tls=tls, plaintext_behind_proxy=True)


def test_status_is_a_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["status", "--help"]) == 0
    assert "--token-file" in capsys.readouterr().out
