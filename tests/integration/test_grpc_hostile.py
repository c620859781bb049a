"""Peers that misbehave once they are in: a clear error for them, and no harm to others."""

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing

import grpc
import pytest
import torch
from wire_fixtures import (
    EchoService,
    RawPeer,
    World,
    assert_serves,
    joined,
    step,
    wait_for_no_stream,
)

from cutlayer.errors import CutlayerError, ProtocolError, TransportError
from cutlayer.wire import codec
from cutlayer.wire.endpoints import ConnectionSettings
from cutlayer.wire.frame import PRELUDE_BYTES, Frame
from cutlayer.wire.grpc_channel import GrpcChannel
from cutlayer.wire.messages import Decoded, Kind


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World.make(tmp_path_factory.mktemp("certificates"))


@pytest.fixture
def service() -> Iterator[EchoService]:
    made = EchoService()
    yield made
    made.pool.shutdown()


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
        (b"CL\x09" + bytes(40), "protocol version 9"),
        (joined(step())[:-8] + b"\xff" * 8, "padding|NaN"),
        (joined(step())[:PRELUDE_BYTES] + bytes(200), "malformed"),
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
        assert len(next(peer.stream)) > PRELUDE_BYTES
        assert len(next(peer.stream)) > PRELUDE_BYTES
    assert service.num_calls == 2


def test_an_answer_to_a_call_never_made_is_a_protocol_error(world: World) -> None:
    def serve(requests: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
        context.send_initial_metadata((("cutlayer-stream", "open"),))
        next(requests)
        yield joined(Frame(step().kind, step().header, {}, call_id=77))

    with pytest.raises(ProtocolError, match="call 77, which was never made"):
        _call_fake_server(serve)


def test_a_short_answer_of_another_size_is_a_protocol_error(world: World) -> None:
    y = codec.encode(torch.ones(3, 3))
    short = Frame(Kind.DECODED, Decoded(), {"y": y}, call_id=1, is_like_call=True)

    def serve(requests: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
        context.send_initial_metadata((("cutlayer-stream", "open"),))
        next(requests)
        yield joined(short)

    with pytest.raises(ProtocolError, match=r"tensor table describes \d+ body bytes"):
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


def test_one_peer_leaves_connections_for_the_others(world: World, service: EchoService) -> None:
    other = world.authority.issue("school")
    with (
        world.listening(service, max_client_streams=2) as listener,
        closing(GrpcChannel(world.connection(listener.port))) as first,
        closing(GrpcChannel(world.connection(listener.port))) as second,
    ):
        with pytest.raises(TransportError, match=r"2 connections here"):
            GrpcChannel(world.connection(listener.port, connect_timeout_s=0.3))
        with closing(GrpcChannel(world.connection(listener.port, tls=other))) as third:
            assert third.call(step()).result(10)
        first.close()
        service.wait(closed=3)
        with closing(GrpcChannel(world.connection(listener.port))) as again:
            assert again.call(step()).result(10)
        assert second.call(step()).result(10)


def test_no_error_reaches_a_caller_unmapped(world: World, service: EchoService) -> None:
    with world.listening(service) as listener:
        channel = GrpcChannel(world.connection(listener.port))
        calls = [channel.call(step("hold")) for _ in range(4)]
        service.wait(held=4)
    for call in calls:
        assert isinstance(call.exception(10), CutlayerError)
    channel.close()
