"""Peers that should not get in, or misbehave once they are in: a clear error, never a hang."""

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from queue import SimpleQueue

import grpc
import pytest
from wire_fixtures import Authority, EchoService, World, step

from cutlayer.errors import CutlayerError, PermissionRefused, ProtocolError, TransportError
from cutlayer.wire import frame
from cutlayer.wire.channel import Connection, Peer
from cutlayer.wire.endpoints import ConnectionSettings, TlsFiles
from cutlayer.wire.frame import Frame
from cutlayer.wire.grpc_channel import GrpcChannel
from cutlayer.wire.grpc_listener import GrpcListener

PATH = "/cutlayer.Wire/Frames"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World.make(tmp_path_factory.mktemp("certificates"))


@pytest.fixture
def service() -> Iterator[EchoService]:
    made = EchoService()
    yield made
    made.pool.shutdown()


class RawPeer:
    """A gRPC client of our own making: it sends any bytes, and reads only when told to."""

    def __init__(self, world: World, port: int) -> None:
        files = world.client
        credentials = grpc.ssl_channel_credentials(
            files.authority.read_bytes(), files.key.read_bytes(), files.certificate.read_bytes()
        )
        self._channel = grpc.secure_channel(f"localhost:{port}", credentials)
        self._outgoing: SimpleQueue[bytes | None] = SimpleQueue()
        self.stream = self._channel.stream_stream(PATH)(iter(self._outgoing.get, None))
        self.send = self._outgoing.put

    def end(self) -> tuple[grpc.StatusCode, str]:
        """How the server ended the stream."""
        return self.stream.code(), self.stream.details()

    def close(self) -> None:
        self.send(None)
        self.stream.cancel()
        self._channel.close()


def joined(message: Frame) -> bytes:
    return b"".join(frame.encode(message))


def refused(settings: ConnectionSettings) -> str:
    start_s = time.monotonic()
    with pytest.raises(PermissionRefused) as caught:
        GrpcChannel(settings)
    assert time.monotonic() - start_s < 4.0, "a refusal must not be retried until the timeout"
    return str(caught.value)


def wait_for_no_stream(listener: GrpcListener) -> None:
    give_up_s = time.monotonic() + 10
    while listener.num_streams and time.monotonic() < give_up_s:
        time.sleep(0.02)
    assert listener.num_streams == 0


def assert_serves(world: World, listener: GrpcListener) -> None:
    with closing(GrpcChannel(world.connection(listener.port))) as channel:
        assert channel.call(step()).result(10).tensors["y"].num_bytes == 64


# certificates


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


# bytes


def test_an_oversized_call_is_refused_with_the_limit(world: World, service: EchoService) -> None:
    with (
        world.listening(service, max_frame_bytes=4096) as listener,
        closing(GrpcChannel(world.connection(listener.port))) as channel,
        pytest.raises(ProtocolError, match=r"DECODE frame of \d+ bytes; the limit is 4096"),
    ):
        channel.call(step(num_bytes=8 << 20)).result(10)
    assert service.num_calls == 0


def test_an_oversized_reply_is_refused_with_the_limit(world: World, service: EchoService) -> None:
    with (
        world.listening(service) as listener,
        closing(GrpcChannel(world.connection(listener.port, max_frame_bytes=4096))) as channel,
    ):
        with pytest.raises(ProtocolError, match=r"DECODED frame of .* the limit is 4096"):
            channel.call(step(num_bytes=8192)).result(10)
        with pytest.raises(ProtocolError, match="the limit is 4096"):
            channel.call(step()).result(10)


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b"GET / HTTP/1.1\r\nHost: trunk.example\r\n\r\n", "the peer is no cutlayer"),
        (bytes(1 << 20), "the peer is no cutlayer"),
        (b"CUTL\x09" + bytes(40), "protocol version 9"),
        (joined(step())[:-8] + b"\xff" * 8, "padding|NaN"),
        (joined(step())[:24] + bytes(200), "malformed"),
    ],
)
def test_garbage_ends_its_own_stream_only(
    world: World, service: EchoService, data: bytes, text: str
) -> None:
    with world.listening(service) as listener, closing(RawPeer(world, listener.port)) as peer:
        peer.send(data)
        if text != "padding|NaN":
            status, details = peer.end()
            assert status is grpc.StatusCode.INVALID_ARGUMENT
            assert text in details
            wait_for_no_stream(listener)
        assert_serves(world, listener)


def test_a_stream_that_ends_inside_a_frame_is_refused(world: World, service: EchoService) -> None:
    with world.listening(service) as listener, closing(RawPeer(world, listener.port)) as peer:
        peer.send(joined(step())[:50])
        peer.send(None)
        status, details = peer.end()
        assert (status, "inside a frame" in details) == (grpc.StatusCode.INVALID_ARGUMENT, True)


def test_frames_cut_anywhere_are_understood(world: World, service: EchoService) -> None:
    with world.listening(service) as listener, closing(RawPeer(world, listener.port)) as peer:
        data = joined(step(position=1)) + joined(step(position=2))
        for start in range(0, len(data), 7):
            peer.send(data[start : start + 7])
        assert len(next(peer.stream)) > 24
        assert len(next(peer.stream)) > 24
    assert service.num_calls == 2


def test_an_answer_to_a_call_never_made_is_a_protocol_error(world: World) -> None:
    def serve(requests: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
        context.send_initial_metadata((("cutlayer-stream", "open"),))
        next(requests)
        yield joined(Frame(step().kind, step().header, {}, call_id=77))

    with pytest.raises(ProtocolError, match="call 77, which was never made"):
        _call_fake_server(serve)


def test_garbage_from_a_server_is_a_protocol_error(world: World) -> None:
    def serve(requests: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
        context.send_initial_metadata((("cutlayer-stream", "open"),))
        next(requests)
        yield b"no frame at all, but long enough"

    with pytest.raises(ProtocolError, match="the peer is no cutlayer"):
        _call_fake_server(serve)


def _call_fake_server(serve: object) -> None:
    server = grpc.server(ThreadPoolExecutor(2))
    handler = grpc.stream_stream_rpc_method_handler(serve)
    server.add_generic_rpc_handlers(
        (grpc.method_handlers_generic_handler("cutlayer.Wire", {"Frames": handler}),)
    )
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    settings = ConnectionSettings(address=f"127.0.0.1:{port}", plaintext=True)
    try:
        with closing(GrpcChannel(settings)) as channel:
            channel.call(step()).result(10)
    finally:
        server.stop(None)


# peers that stop


def test_a_peer_that_stops_reading_is_cut_off(world: World, service: EchoService) -> None:
    with (
        world.listening(service, stall_timeout_s=0.6, max_in_flight=4) as listener,
        closing(RawPeer(world, listener.port)) as peer,
    ):
        for _ in range(40):
            peer.send(joined(step(num_bytes=(1 << 20) - 200)))
        service.wait(calls=1)
        wait_for_no_stream(listener)
        assert service.num_calls < 40, "replies that nobody reads must stop the reading of calls"
        service.wait(closed=1)
        assert_serves(world, listener)


def test_a_peer_that_stops_inside_a_frame_is_cut_off(world: World, service: EchoService) -> None:
    with (
        world.listening(service, stall_timeout_s=0.4) as listener,
        closing(RawPeer(world, listener.port)) as peer,
    ):
        peer.send(joined(step(num_bytes=4096))[:2000])
        status, details = peer.end()
        assert status is grpc.StatusCode.UNAVAILABLE
        assert "rest of a frame did not come" in details


def test_an_idle_peer_is_left_alone(world: World, service: EchoService) -> None:
    with (
        world.listening(service, stall_timeout_s=0.2) as listener,
        closing(GrpcChannel(world.connection(listener.port))) as channel,
    ):
        channel.call(step()).result(10)
        time.sleep(0.8)
        channel.call(step()).result(10)


def test_a_long_computation_is_no_stall(world: World, service: EchoService) -> None:
    with (
        world.listening(service, stall_timeout_s=0.2) as listener,
        closing(GrpcChannel(world.connection(listener.port))) as channel,
    ):
        pending = channel.call(step("hold"))
        service.wait(held=1)
        time.sleep(0.8)
        service.release()
        assert pending.result(10)


def test_more_peers_than_allowed_are_told_so(world: World, service: EchoService) -> None:
    with (
        world.listening(service, max_streams=2) as listener,
        closing(GrpcChannel(world.connection(listener.port))) as first,
        closing(GrpcChannel(world.connection(listener.port))) as second,
    ):
        with pytest.raises(TransportError, match=r"2 connections \(listen.max_streams\)"):
            GrpcChannel(world.connection(listener.port, connect_timeout_s=0.3))
        first.close()
        service.wait(closed=1)
        assert second.call(step()).result(10)
        assert_serves(world, listener)


def test_no_error_reaches_a_caller_unmapped(world: World, service: EchoService) -> None:
    with world.listening(service) as listener:
        channel = GrpcChannel(world.connection(listener.port))
        calls = [channel.call(step("hold")) for _ in range(4)]
        service.wait(held=4)
    for call in calls:
        assert isinstance(call.exception(10), CutlayerError)
    channel.close()
