"""Who gets in: certificates, names, purposes, permission, revocation of open streams."""

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import grpc
import pytest
from wire_fixtures import (
    PATH,
    Authority,
    EchoService,
    World,
    assert_serves,
    joined,
    step,
    wait_for_no_stream,
)

from cutlayer.errors import PermissionRefused, ProtocolError, TransportError
from cutlayer.wire.channel import Connection, Peer
from cutlayer.wire.endpoints import ConnectionSettings, TlsFiles
from cutlayer.wire.grpc_channel import GrpcChannel


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World.make(tmp_path_factory.mktemp("certificates"))


@pytest.fixture
def service() -> Iterator[EchoService]:
    made = EchoService()
    yield made
    made.pool.shutdown()


def refused(settings: ConnectionSettings) -> str:
    start_s = time.monotonic()
    with pytest.raises(PermissionRefused) as caught:
        GrpcChannel(settings)
    assert time.monotonic() - start_s < 4.0, "a refusal must not be retried until the timeout"
    return str(caught.value)


def test_a_client_of_another_authority_is_refused(
    world: World, service: EchoService, tmp_path: Path
) -> None:
    stranger = Authority(tmp_path, "authority").issue("stranger")
    files = TlsFiles(
        certificate=stranger.certificate, key=stranger.key, authority=world.authority.path
    )
    with world.listening(service) as listener:
        said = refused(world.connection(listener.port, files))
        assert "the server refuses this side's certificate" in said
        assert_serves(world, listener)
    assert [peer.name for peer in service.peers] == ["hospital"]


def test_a_server_of_another_authority_is_refused(
    world: World, service: EchoService, tmp_path: Path
) -> None:
    own = Authority(tmp_path, "other")
    files = TlsFiles(certificate=world.client.certificate, key=world.client.key, authority=own.path)
    with world.listening(service) as listener:
        assert "this side refuses the server's certificate" in refused(
            world.connection(listener.port, files)
        )
    assert service.peers == []


def test_an_expired_client_certificate_is_refused(world: World, service: EchoService) -> None:
    expired = world.authority.issue("expired", days=-1)
    with world.listening(service) as listener:
        assert "it expired on" in refused(world.connection(listener.port, expired))
    assert service.peers == []


def test_an_expired_server_certificate_is_refused(world: World, service: EchoService) -> None:
    expired = world.authority.issue("old-server", days=-1, host="localhost")
    with world.listening(service, tls=expired) as listener:
        assert "has expired" in refused(world.connection(listener.port))
    assert service.peers == []


def test_a_server_of_another_name_is_refused_unless_that_name_is_set(
    world: World, service: EchoService
) -> None:
    other = world.authority.issue("trunk", host="trunk.example")
    with world.listening(service, tls=other) as listener:
        assert "connection.server_name" in refused(world.connection(listener.port))
        settings = world.connection(listener.port, server_name="trunk.example")
        with closing(GrpcChannel(settings)) as channel:
            channel.call(step()).result(10)


def test_a_client_certificate_cannot_play_the_server(world: World, service: EchoService) -> None:
    with world.listening(service, tls=world.client) as listener:
        assert "purpose" in refused(world.connection(listener.port))


@pytest.mark.parametrize("how", ["no certificate", "plaintext"])
def test_a_peer_without_a_certificate_gets_nowhere(
    world: World, service: EchoService, how: str
) -> None:
    with world.listening(service) as listener:
        address = f"localhost:{listener.port}"
        if how == "plaintext":
            with pytest.raises((TransportError, PermissionRefused)):
                GrpcChannel(
                    ConnectionSettings(address=address, plaintext=True, connect_timeout_s=0.5)
                )
        else:
            root = grpc.ssl_channel_credentials(world.authority.path.read_bytes())
            with grpc.secure_channel(address, root) as channel:
                stream = channel.stream_stream(PATH)(iter([joined(step())]))
                assert stream.code() is grpc.StatusCode.UNAVAILABLE
        assert_serves(world, listener)
    assert len(service.peers) == 1


def test_tls_to_a_plaintext_server_is_refused(world: World) -> None:
    server = grpc.server(ThreadPoolExecutor(1))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    assert "both sides use tls" in refused(world.connection(port))
    server.stop(None)


def test_a_foreign_grpc_server_is_named_as_such(world: World) -> None:
    server = grpc.server(ThreadPoolExecutor(1))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    settings = ConnectionSettings(address=f"127.0.0.1:{port}", plaintext=True)
    with pytest.raises(ProtocolError, match="not one of cutlayer"):
        GrpcChannel(settings)
    server.stop(None)


# permission


class Picky(EchoService):
    def connect(self, peer: Peer) -> Connection:
        raise PermissionRefused(f"{peer.name} has the roles none; training needs the role train")


def test_a_service_that_refuses_a_peer_says_why(world: World) -> None:
    picky = Picky()
    with world.listening(picky) as listener:
        assert "needs the role train" in refused(world.connection(listener.port))


@pytest.mark.parametrize("is_idle", [True, False])
def test_revocation_ends_an_open_stream(world: World, service: EchoService, is_idle: bool) -> None:
    allowed = [True]
    with (
        world.listening(service, is_allowed=allowed) as listener,
        closing(GrpcChannel(world.connection(listener.port))) as channel,
    ):
        channel.call(step()).result(10)
        pending = None if is_idle else channel.call(step("hold"))
        service.wait(calls=1 if is_idle else 2)
        allowed[0] = False
        if pending is not None:
            with pytest.raises(PermissionRefused, match=r"'hospital'.*revoked"):
                pending.result(3)
        wait_for_no_stream(listener)
        with pytest.raises(PermissionRefused, match="revoked"):
            channel.call(step()).result(3)
        assert "revoked" in refused(world.connection(listener.port))
    assert service.num_closed == 1


def test_a_frame_after_revocation_is_never_submitted(world: World, service: EchoService) -> None:
    allowed = [True]
    with (
        world.listening(service, is_allowed=allowed, recheck_s=60.0) as listener,
        closing(GrpcChannel(world.connection(listener.port))) as channel,
    ):
        channel.call(step()).result(10)
        allowed[0] = False
        with pytest.raises(PermissionRefused, match="revoked"):
            channel.call(step()).result(10)
    assert service.num_calls == 1
