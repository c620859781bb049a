"""The emulated link. Delays are asserted from below only: a busy machine may always be slower."""

import socket
import threading
import time
from collections.abc import Iterator

import pytest

from benchmarks.link import LINK_PROFILES, Counters, DelayingProxy, LinkProfile
from benchmarks.link_process import Lane

_MEGABYTE = 1_000_000


def _serve_echo(listener: socket.socket) -> None:
    while True:
        try:
            peer, _ = listener.accept()
        except OSError:
            return
        threading.Thread(target=_echo, args=(peer,), daemon=True).start()


def _echo(peer: socket.socket) -> None:
    with peer:
        peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        while chunk := peer.recv(65536):
            peer.sendall(chunk)


@pytest.fixture
def echo_port() -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=_serve_echo, args=(listener,), daemon=True).start()
        yield listener.getsockname()[1]
        listener.shutdown(socket.SHUT_RDWR)


@pytest.fixture
def sink() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield listener


def _connect(proxy: DelayingProxy) -> socket.socket:
    end = socket.create_connection(("127.0.0.1", proxy.port), timeout=20)
    end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return end


def _receive(end: socket.socket, num_bytes: int) -> bytes:
    chunks = bytearray()
    while len(chunks) < num_bytes and (chunk := end.recv(65536)):
        chunks += chunk
    return bytes(chunks)


def test_one_byte_echo_takes_at_least_the_round_trip_time(echo_port: int) -> None:
    with DelayingProxy(echo_port, LINK_PROFILES["wan"]) as proxy, _connect(proxy) as end:
        for _ in range(5):
            begin_s = time.monotonic()
            end.sendall(b"x")
            assert _receive(end, 1) == b"x"
            assert time.monotonic() - begin_s >= 0.040


def test_a_transfer_takes_at_least_its_time_on_the_wire(sink: socket.socket) -> None:
    link = LinkProfile(rtt_ms=20.0, rate_mbit_per_s=80.0)
    with DelayingProxy(sink.getsockname()[1], link) as proxy, _connect(proxy) as end:
        far, _ = sink.accept()
        begin_s = time.monotonic()
        sender = threading.Thread(target=end.sendall, args=(bytes(2 * _MEGABYTE),))
        sender.start()
        assert len(_receive(far, 2 * _MEGABYTE)) == 2 * _MEGABYTE
        assert time.monotonic() - begin_s >= 0.2 + 0.010
        sender.join()
        far.close()


def test_messages_in_flight_share_one_delay(echo_port: int) -> None:
    """Twenty messages of a stop-and-wait link would take twenty round trips."""
    link = LinkProfile(rtt_ms=100.0, rate_mbit_per_s=None)
    with DelayingProxy(echo_port, link) as proxy, _connect(proxy) as end:
        begin_s = time.monotonic()
        for _ in range(20):
            end.sendall(b"x" * 10)
            time.sleep(0.001)
        assert len(_receive(end, 200)) == 200
        assert 0.1 <= time.monotonic() - begin_s < 20 * 0.1


def test_connections_share_the_rate(sink: socket.socket) -> None:
    link = LinkProfile(rtt_ms=0.0, rate_mbit_per_s=80.0)
    with DelayingProxy(sink.getsockname()[1], link) as proxy:
        ends = [_connect(proxy) for _ in range(2)]
        fars = [sink.accept()[0] for _ in range(2)]
        begin_s = time.monotonic()
        senders = [threading.Thread(target=end.sendall, args=(bytes(_MEGABYTE),)) for end in ends]
        receivers = [threading.Thread(target=_receive, args=(far, _MEGABYTE)) for far in fars]
        for thread in senders + receivers:
            thread.start()
        for thread in senders + receivers:
            thread.join()
        assert time.monotonic() - begin_s >= 0.2
        for end in ends + fars:
            end.close()


def test_bytes_are_counted_per_direction_and_arrive_unchanged(sink: socket.socket) -> None:
    payload = bytes(range(256)) * 1000
    with (
        DelayingProxy(sink.getsockname()[1], LINK_PROFILES["loopback"]) as proxy,
        _connect(proxy) as end,
    ):
        far, _ = sink.accept()
        threading.Thread(target=end.sendall, args=(payload,)).start()
        assert _receive(far, len(payload)) == payload
        far.sendall(b"y" * 7)
        assert _receive(end, 7) == b"y" * 7
        assert proxy.counters() == Counters(bytes_up=len(payload), bytes_down=7, connections=1)
        proxy.reset()
        assert proxy.counters() == Counters(bytes_up=0, bytes_down=0, connections=0)
        far.close()


def test_the_link_changes_under_an_open_connection(echo_port: int) -> None:
    with DelayingProxy(echo_port, LINK_PROFILES["loopback"]) as proxy, _connect(proxy) as end:
        end.sendall(b"a")
        assert _receive(end, 1) == b"a"
        proxy.set_link(LinkProfile(rtt_ms=60.0, rate_mbit_per_s=None))
        begin_s = time.monotonic()
        end.sendall(b"b")
        assert _receive(end, 1) == b"b"
        assert time.monotonic() - begin_s >= 0.060


def test_order_survives_a_link_that_becomes_faster(sink: socket.socket) -> None:
    slow = LinkProfile(rtt_ms=400.0, rate_mbit_per_s=None)
    with DelayingProxy(sink.getsockname()[1], slow) as proxy, _connect(proxy) as end:
        far, _ = sink.accept()
        end.sendall(b"first")
        while proxy.counters().bytes_up < 5:
            time.sleep(0.005)
        proxy.set_link(LINK_PROFILES["loopback"])
        end.sendall(b"second")
        assert _receive(far, 11) == b"firstsecond"
        far.close()


def test_a_close_travels_after_the_last_byte(sink: socket.socket) -> None:
    link = LinkProfile(rtt_ms=40.0, rate_mbit_per_s=None)
    with DelayingProxy(sink.getsockname()[1], link) as proxy:
        end = _connect(proxy)
        far, _ = sink.accept()
        far.settimeout(20)
        end.sendall(b"last")
        end.close()
        assert _receive(far, 4) == b"last"
        assert far.recv(1) == b""
        far.close()


def test_a_dead_server_breaks_the_clients_connection(sink: socket.socket) -> None:
    lan = LINK_PROFILES["lan"]
    with DelayingProxy(sink.getsockname()[1], lan) as proxy, _connect(proxy) as end:
        far, _ = sink.accept()
        far.close()
        assert end.recv(1) == b""


def test_an_absent_server_closes_the_connection_and_a_later_one_works(sink: socket.socket) -> None:
    port = sink.getsockname()[1]
    sink.close()
    with DelayingProxy(port, LINK_PROFILES["lan"]) as proxy:
        with _connect(proxy) as end:
            assert end.recv(1) == b""
        with socket.create_server(("127.0.0.1", port)) as listener, _connect(proxy) as end:
            far, _ = listener.accept()
            far.sendall(b"back")
            assert _receive(end, 4) == b"back"
            far.close()


def test_a_lane_never_runs_faster_than_its_rate() -> None:
    lane = Lane(delay_s=0.5, bytes_per_s=1000.0)
    assert lane.accept(100, now_s=10.0) == pytest.approx(10.6)
    assert lane.accept(100, now_s=10.0) == pytest.approx(10.7)
    assert lane.accept(100, now_s=20.0) == pytest.approx(20.6)
    assert lane.num_bytes == 300
