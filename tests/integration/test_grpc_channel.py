"""The gRPC channel over real sockets on 127.0.0.1: calls, errors, deadlines."""

import threading
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace

import pytest
import torch
from wire_fixtures import EchoService, World, step

from benchmarks.link import DelayingProxy, LinkProfile
from cutlayer.errors import CacheFull, CutlayerError, TransportError
from cutlayer.wire import codec
from cutlayer.wire.frame import PRELUDE_BYTES, Frame, frame_bytes
from cutlayer.wire.grpc_channel import GrpcChannel


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
    short = replace(reply, is_like_call=True)
    assert channel.bytes_received == frame_bytes(short) == PRELUDE_BYTES + 4096
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
