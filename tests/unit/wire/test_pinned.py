"""The certificate that whoever answers shows; who does not answer, or not with TLS."""

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from cutlayer.errors import ConfigError, PermissionRefused, TransportError
from cutlayer.wire.endpoints import ConnectionSettings, TlsFiles
from cutlayer.wire.pinned import shown_certificate

NOWHERE = TlsFiles(certificate=Path("c"), key=Path("k"), authority=Path("a"))


@contextmanager
def answering(answer: Callable[[socket.socket], None]) -> Iterator[ConnectionSettings]:
    """A server of our own making; nobody reads the settings' files."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            with suppress(OSError):
                peer, _ = listener.accept()
                with peer:
                    answer(peer)

        threading.Thread(target=serve, daemon=True).start()
        port = listener.getsockname()[1]
        yield ConnectionSettings(address=f"127.0.0.1:{port}", tls=NOWHERE, connect_timeout_s=1.0)


def _drip(peer: socket.socket) -> None:
    # A handshake record of 16 KiB, of which a byte comes now and then.
    peer.sendall(b"\x16\x03\x03\x40\x00")
    while True:
        peer.sendall(b"\x02")
        time.sleep(0.2)


def test_a_peer_that_drips_bytes_is_given_up_in_time() -> None:
    with answering(_drip) as settings:
        began_s = time.monotonic()
        with pytest.raises(TransportError, match="timed out"):
            shown_certificate(settings)
        assert time.monotonic() - began_s < 5.0


def test_a_peer_that_says_nothing_is_given_up_in_time() -> None:
    with answering(lambda peer: time.sleep(3.0)) as settings, pytest.raises(TransportError):
        shown_certificate(settings)


def test_a_peer_that_does_not_speak_tls_is_named() -> None:
    def answer(peer: socket.socket) -> None:
        peer.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n" * 40)
        peer.recv(4096)

    with answering(answer) as settings, pytest.raises(PermissionRefused, match=r"TLS 1\.3"):
        shown_certificate(settings)


def test_a_peer_that_hangs_up_is_named() -> None:
    with answering(lambda peer: None) as settings, pytest.raises(TransportError):
        shown_certificate(settings)


def test_nobody_at_the_port_is_a_transport_error() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    settings = ConnectionSettings(address=f"127.0.0.1:{port}", tls=NOWHERE)
    with pytest.raises(TransportError, match="does not answer"):
        shown_certificate(settings)


def test_without_tls_there_is_no_key_to_vouch_for() -> None:
    with pytest.raises(ConfigError, match="evidence needs TLS"):
        shown_certificate(ConnectionSettings(address="127.0.0.1:1", plaintext=True))


@pytest.mark.parametrize("host", ["a..b", "x" * 300, "....."])
def test_a_name_that_nobody_can_have_is_no_answer(host: str) -> None:
    with pytest.raises(TransportError, match="does not answer"):
        shown_certificate(ConnectionSettings(address=f"{host}:443", tls=NOWHERE))
