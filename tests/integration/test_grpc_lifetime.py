"""The life of a connection: open, close, a server that dies, freezes, drains or renews."""

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
from wire_fixtures import EchoService, World, step

from cutlayer.errors import ConfigError, TransportError
from cutlayer.wire import codec
from cutlayer.wire.endpoints import ConnectionSettings, ListenSettings
from cutlayer.wire.frame import Frame
from cutlayer.wire.grpc_channel import GrpcChannel
from cutlayer.wire.grpc_listener import GrpcListener


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World.make(tmp_path_factory.mktemp("certificates"))


@pytest.fixture
def service() -> EchoService:
    return EchoService()


def value(reply: Frame) -> float:
    return float(codec.decode(reply.tensors["y"])[0, 0])


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
