"""A server's listener and health port, opened in two steps."""

import socket
import urllib.error
import urllib.request

import pytest

from cutlayer.errors import ConfigError, PermissionRefused
from cutlayer.server.doors import Doors
from cutlayer.server.settings import ServerSettings
from cutlayer.settings import parse_settings
from cutlayer.wire.channel import Connection, Peer


class _Closed:
    """A service that lets nobody in."""

    def connect(self, peer: Peer) -> Connection:
        raise PermissionRefused(f"not {peer.name}")


def _settings(health_port: int | None) -> ServerSettings:
    table = {
        "model": {"path": "unused", "lower": 1, "upper": 2},
        "listen": {"address": "127.0.0.1:0", "plaintext": True},
        "state": {"folder": "unused"},
        "health_port": health_port,
    }
    return parse_settings(ServerSettings, table, "test")


def _status(port: int | None, path: str) -> int:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=5) as reply:
            return int(reply.status)
    except urllib.error.HTTPError as error:
        with error:
            return error.code


def _accepts(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=5).close()
    except ConnectionRefusedError:
        return False
    return True


def test_the_operator_is_answered_before_clients_are_let_in_and_after() -> None:
    is_ready = False
    doors = Doors(_settings(health_port=0))
    doors.prepare(_Closed(), lambda: is_ready, lambda: b"")
    try:
        assert _status(doors.health_port, "/readyz") == 503
        doors.listen()
        is_ready = True
        assert _accepts(doors.port)
        assert _status(doors.health_port, "/readyz") == 200
        port = doors.port
        doors.stop_listening(0.0)
        assert not _accepts(port)
        assert _status(doors.health_port, "/healthz") == 200
    finally:
        doors.close()


def test_without_a_health_port_nothing_is_served_to_the_operator() -> None:
    doors = Doors(_settings(health_port=None))
    doors.prepare(_Closed(), lambda: True, lambda: b"")
    assert doors.health_port is None
    assert doors.num_streams == 0
    doors.stop_listening(0.0)
    doors.close()


def test_doors_that_were_never_opened_can_be_closed() -> None:
    doors = Doors(_settings(health_port=None))
    doors.stop_listening(0.0)
    doors.close()
    assert doors.num_streams == 0


def test_a_taken_health_port_is_named() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = int(taken.getsockname()[1])
        with pytest.raises(ConfigError, match=f"health_port {port}"):
            Doors(_settings(port)).prepare(_Closed(), lambda: True, lambda: b"")
