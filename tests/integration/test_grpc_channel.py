"""The gRPC channel over real sockets on 127.0.0.1: the main path, calls, deadlines, drain."""

import os
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest
import torch
from wire_fixtures import EchoService, World, step

from benchmarks.link import DelayingProxy, LinkProfile
from cutlayer.errors import CacheFull, ConfigError, CutlayerError, TransportError
from cutlayer.wire import codec
from cutlayer.wire.endpoints import ConnectionSettings, ListenSettings
from cutlayer.wire.frame import Frame, frame_bytes
from cutlayer.wire.grpc_channel import GrpcChannel
from cutlayer.wire.grpc_listener import GrpcListener


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World.make(tmp_path_factory.mktemp("certificates"))


@pytest.fixture
def service() -> EchoService:
    return EchoService()


@pytest.fixture
def channel(world: World, service: EchoService) -> Iterator[GrpcChannel]:
    with (
        world.listening(service, max_in_flight=64) as listener,
        closing(GrpcChannel(world.connection(listener.port, max_in_flight=64))) as opened,
    ):
        yield opened


def value(reply: Frame) -> float:
    return float(codec.decode(reply.tensors["y"])[0, 0])


def test_a_call_is_answered_and_every_frame_byte_is_counted(
    channel: GrpcChannel, service: EchoService
) -> None:
    call = step(num_bytes=4096, position=5)
    reply = channel.call(call).result(10)
    assert value(reply) == 5.0
    assert channel.bytes_sent == frame_bytes(call)
    assert channel.bytes_received == frame_bytes(reply)
    (peer,) = service.peers
    assert (peer.name, peer.address.startswith("ipv4:127.0.0.1")) == ("hospital", True)


@pytest.mark.parametrize("num_bytes", [1 << 20, (5 << 20) + 12, 24 << 20])
def test_frames_of_many_chunks_arrive_whole(channel: GrpcChannel, num_bytes: int) -> None:
    x = torch.arange(num_bytes // 4, dtype=torch.float32).reshape(1, -1)
    call = Frame(step().kind, step().header, {"h": codec.encode(x)})
    assert torch.equal(codec.decode(channel.call(call).result(20).tensors["y"]), x)


def test_calls_answered_out_of_order_reach_their_callers(
    channel: GrpcChannel, service: EchoService
) -> None:
    futures = [channel.call(step("hold", position=n)) for n in range(50)]
    service.wait(held=50)
    while service.held:
        service.release(len(service.held) // 2)
    assert [value(future.result(10)) for future in futures] == [float(n) for n in range(50)]


def test_calls_from_many_threads_reach_their_callers(channel: GrpcChannel) -> None:
    wrong: list[tuple[int, float]] = []

    def work(first: int) -> None:
        for n in range(first, first + 40):
            found = value(channel.call(step(num_bytes=4 * n + 4, position=n)).result(10))
            if found != n:
                wrong.append((n, found))

    threads = [threading.Thread(target=work, args=(100 * n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_a_call_waits_while_too_many_are_in_flight(world: World, service: EchoService) -> None:
    with (
        world.listening(service) as listener,
        closing(GrpcChannel(world.connection(listener.port, max_in_flight=2))) as channel,
    ):
        futures = [channel.call(step("hold")) for _ in range(2)]
        third = channel.call(step("echo"), deadline_s=0.2)
        with pytest.raises(TransportError, match="no byte moved"):
            third.result(5)
        service.wait(held=2)
        service.release()
        assert channel.call(step("echo", position=3)).result(10)
        service.release()
        assert [value(future.result(10)) for future in futures] == [0.0, 0.0]


def test_the_server_reads_no_more_than_it_may_have_in_flight(
    world: World, service: EchoService
) -> None:
    with (
        world.listening(service, max_in_flight=3) as listener,
        closing(GrpcChannel(world.connection(listener.port, max_in_flight=10))) as channel,
    ):
        futures = [channel.call(step("hold")) for _ in range(10)]
        service.wait(held=3)
        time.sleep(0.2)
        assert len(service.held) == 3
        for done in range(1, 11):
            service.wait(held=1)
            service.release()
            service.wait(calls=min(done + 3, 10))
        assert all(future.result(10) for future in futures)


def test_an_error_of_the_service_is_raised_by_the_call(channel: GrpcChannel) -> None:
    with pytest.raises(CacheFull, match="no KV bytes left; ask again later"):
        channel.call(step("full")).result(10)
    assert value(channel.call(step(position=1)).result(10)) == 1.0


def test_a_bug_in_the_service_tells_the_peer_nothing(
    channel: GrpcChannel, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(CutlayerError, match="its log says why") as caught:
        channel.call(step("bug")).result(10)
    assert "runner" not in str(caught.value)
    assert "a bug in the runner" in caplog.text
    assert value(channel.call(step(position=1)).result(10)) == 1.0


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_bug_in_submit_ends_that_connection_only(world: World, service: EchoService) -> None:
    with (
        world.listening(service) as listener,
        closing(GrpcChannel(world.connection(listener.port))) as other,
        closing(GrpcChannel(world.connection(listener.port))) as channel,
    ):
        with pytest.raises(CutlayerError, match="its log says why"):
            channel.call(step("crash")).result(10)
        assert value(other.call(step(position=1)).result(10)) == 1.0


def test_a_deadline_without_progress_fails_that_call_only(
    channel: GrpcChannel, service: EchoService
) -> None:
    start_s = time.monotonic()
    late = channel.call(step("hold"), deadline_s=0.3)
    with pytest.raises(TransportError, match=r"no byte moved for 0.3 s.*deadline_s"):
        late.result(5)
    assert time.monotonic() - start_s < 2.0
    service.wait(held=1)
    service.release()
    assert value(channel.call(step(position=2)).result(10)) == 2.0


def test_a_slow_link_that_moves_does_not_miss_the_deadline(
    world: World, service: EchoService
) -> None:
    slow = LinkProfile(rtt_ms=0.0, rate_mbit_per_s=32.0)
    with world.listening(service) as listener, DelayingProxy(listener.port, slow) as proxy:
        settings = world.connection(proxy.port)
        with closing(GrpcChannel(settings)) as channel:
            start_s = time.monotonic()
            reply = channel.call(step(num_bytes=8 << 20, position=4), deadline_s=1.5).result(30)
            assert value(reply) == 4.0
            assert time.monotonic() - start_s > 2 * 1.5


def test_close_fails_what_is_in_flight_and_tells_the_service_once(
    world: World, service: EchoService
) -> None:
    with world.listening(service) as listener:
        channel = GrpcChannel(world.connection(listener.port))
        pending = channel.call(step("hold"))
        service.wait(held=1)
        channel.close()
        channel.close()
        with pytest.raises(TransportError, match="closed"):
            pending.result(1)
        with pytest.raises(TransportError, match="closed"):
            channel.call(step()).result(1)
        service.wait(closed=1)
        assert service.num_closed == 1


def test_closing_leaves_no_thread_behind(world: World, service: EchoService) -> None:
    with world.listening(service) as listener:
        GrpcChannel(world.connection(listener.port)).close()
        before = threading.active_count()
        for _ in range(5):
            with closing(GrpcChannel(world.connection(listener.port))) as channel:
                channel.call(step()).result(10)
        service.wait(closed=6)
        time.sleep(0.3)
        # the listener's pool keeps its threads for the next connections
        names = [thread.name for thread in threading.enumerate()]
        others = [name for name in names if not name.startswith(("cutlayer-stream", "Thread"))]
        assert len(others) <= before, others


SERVER = """
import sys, time
from pathlib import Path
from wire_fixtures import EchoService, identify
from cutlayer.wire.endpoints import ListenSettings, TlsFiles
from cutlayer.wire.grpc_listener import GrpcListener
certificate, key, authority = map(Path, sys.argv[1:])
tls = TlsFiles(certificate=certificate, key=key, authority=authority)
listener = GrpcListener(
    EchoService(), ListenSettings(address="127.0.0.1:0", tls=tls), identify=identify)
listener.start()
print(listener.port, flush=True)
time.sleep(120)
"""


@contextmanager
def server_process(world: World) -> Iterator[tuple[int, subprocess.Popen[str]]]:
    files = [str(p) for p in (world.server.certificate, world.server.key, world.server.authority)]
    paths = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    with subprocess.Popen(
        [sys.executable, "-c", SERVER, *files],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": paths},
    ) as process:
        assert process.stdout is not None
        try:
            yield int(process.stdout.readline()), process
        finally:
            process.kill()


def test_a_killed_server_fails_the_calls_at_once(world: World) -> None:
    with (
        server_process(world) as (port, process),
        closing(GrpcChannel(world.connection(port))) as channel,
    ):
        assert value(channel.call(step(position=1)).result(10)) == 1.0
        pending = channel.call(step("hold"))
        process.kill()
        start_s = time.monotonic()
        with pytest.raises(TransportError):
            pending.result(10)
        assert time.monotonic() - start_s < 2.0
        with pytest.raises(TransportError):
            channel.call(step()).result(1)


def test_a_frozen_server_is_found_by_keepalive(world: World) -> None:
    with (
        server_process(world) as (port, process),
        closing(
            GrpcChannel(world.connection(port, keepalive_s=10.0, keepalive_timeout_s=0.5))
        ) as channel,
    ):
        pending = channel.call(step("hold"), deadline_s=100.0)
        process.send_signal(signal.SIGSTOP)
        with pytest.raises(TransportError, match="ping timeout"):
            pending.result(25)


def test_nobody_listening_is_an_error_within_the_connect_timeout(world: World) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    start_s = time.monotonic()
    with pytest.raises(TransportError, match=f"localhost:{port}.*refused"):
        GrpcChannel(world.connection(port, connect_timeout_s=0.5))
    assert time.monotonic() - start_s < 4.0


def test_a_server_that_accepts_and_stays_silent_is_an_error(world: World) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        start_s = time.monotonic()
        with pytest.raises(TransportError, match=r"did not answer in 0.5 s"):
            GrpcChannel(world.connection(silent.getsockname()[1], connect_timeout_s=0.5))
        assert time.monotonic() - start_s < 4.0


def test_a_server_that_starts_late_is_waited_for(world: World, service: EchoService) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    opened: list[GrpcChannel] = []
    settings = world.connection(port, connect_timeout_s=10.0)
    thread = threading.Thread(target=lambda: opened.append(GrpcChannel(settings)))
    thread.start()
    time.sleep(0.7)
    tls = {"address": f"127.0.0.1:{port}"}
    with world.listening(service, **tls):  # type: ignore[arg-type]
        thread.join(10)
        with closing(opened[0]) as channel:
            assert value(channel.call(step(position=1)).result(10)) == 1.0


def test_stopping_finishes_what_is_in_flight_and_refuses_the_rest(
    world: World, service: EchoService
) -> None:
    with (
        world.listening(service) as listener,
        closing(GrpcChannel(world.connection(listener.port))) as channel,
    ):
        pending = channel.call(step("hold", position=6))
        service.wait(held=1)
        stopping = threading.Thread(target=listener.stop, args=(10.0,))
        start_s = time.monotonic()
        stopping.start()
        time.sleep(0.2)
        with pytest.raises(TransportError, match="stopping"):
            channel.call(step()).result(5)
        with pytest.raises(TransportError):
            GrpcChannel(world.connection(listener.port, connect_timeout_s=0.3))
        service.release()
        assert value(pending.result(5)) == 6.0
        stopping.join(5)
        assert not stopping.is_alive()
        assert time.monotonic() - start_s < 8.0
        service.wait(closed=1)


def test_a_renewed_certificate_is_served_without_a_restart(
    tmp_path: Path, service: EchoService
) -> None:
    world = World.make(tmp_path)

    def served_certificate(port: int) -> str:
        context = ssl.create_default_context(cafile=world.authority.path)
        context.load_cert_chain(world.client.certificate, world.client.key)
        with (
            socket.create_connection(("127.0.0.1", port)) as plain,
            context.wrap_socket(plain, server_hostname="localhost") as secure,
        ):
            der = secure.getpeercert(binary_form=True)
            assert der is not None
            return ssl.DER_cert_to_PEM_cert(der)

    with world.listening(service) as listener:
        with closing(GrpcChannel(world.connection(listener.port))) as channel:
            old = served_certificate(listener.port)
            world.server.key.write_bytes(world.client.key.read_bytes())
            assert served_certificate(listener.port) == old  # key and certificate do not fit yet
            world.authority.issue("server", host="localhost")
            assert served_certificate(listener.port) == world.server.certificate.read_text()
            assert world.server.certificate.read_text() != old
            assert value(channel.call(step(position=1)).result(10)) == 1.0
        with closing(GrpcChannel(world.connection(listener.port))) as channel:
            assert value(channel.call(step(position=1)).result(10)) == 1.0


def test_plaintext_works_on_loopback(service: EchoService) -> None:
    settings = ListenSettings(address="127.0.0.1:0", plaintext=True)
    listener = GrpcListener(service, settings, identify=lambda pem: pytest.fail("no certificate"))
    listener.start()
    address = f"127.0.0.1:{listener.port}"
    with closing(GrpcChannel(ConnectionSettings(address=address, plaintext=True))) as channel:
        assert value(channel.call(step(position=1)).result(10)) == 1.0
    listener.stop()
    service.pool.shutdown()
    assert service.peers[0].roles == {"train", "generate"}


def test_a_taken_port_is_an_error_that_names_it(world: World, service: EchoService) -> None:
    with world.listening(service) as listener:
        settings = ListenSettings(address=f"127.0.0.1:{listener.port}", tls=world.server)
        second = GrpcListener(service, settings, identify=lambda pem: pytest.fail("unused"))
        with pytest.raises(ConfigError, match=f"cannot listen on 127.0.0.1:{listener.port}"):
            second.start()
