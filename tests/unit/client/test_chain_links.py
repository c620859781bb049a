"""Links of several hops that break at random, before or behind a call: each step counts once."""

import random
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from pathlib import Path

import pytest

from cutlayer import Client, TrunkServer
from cutlayer.errors import ProtocolError, TransportError
from cutlayer.wire.channel import Channel
from cutlayer.wire.frame import Frame
from cutlayer.wire.messages import Committed, Kind
from cutlayer.wire.wrapped import WrappedChannel
from tests.chain_worlds import THREE, chain_settings, client_of_hops, running_hops, six_blocks
from tests.worlds import loopback

_BREAKS = {Kind.FORWARD, Kind.BACKWARD, Kind.COMMIT, Kind.OPEN_RUN, Kind.DECODE}


class _Breaking:
    """A channel that is lost at some calls: half of them arrive all the same."""

    def __init__(self, inner: Channel, draw: random.Random, share: float) -> None:
        self._inner, self._draw, self._share = inner, draw, share
        self._is_lost = False

    @property
    def bytes_sent(self) -> int:
        return self._inner.bytes_sent

    @property
    def bytes_received(self) -> int:
        return self._inner.bytes_received

    def call(self, frame: Frame, deadline_s: float | None = None) -> "Future[Frame]":
        breaks = frame.kind in _BREAKS and self._draw.random() < self._share
        if not self._is_lost and not breaks:
            return self._inner.call(frame, deadline_s)
        if not self._is_lost and self._draw.random() < 0.5:
            self._inner.call(frame, deadline_s).exception()
        self._is_lost = True
        lost: Future[Frame] = Future()
        lost.set_exception(TransportError("the link broke"))
        return lost

    def close(self) -> None:
        self._inner.close()


def _connects(
    servers: list[TrunkServer], draw: random.Random, counts: list[int]
) -> list[Callable[[], Channel]]:
    def connect(number: int) -> Channel:
        counts[number] += 1
        return _Breaking(loopback(servers[number]), draw, share=0.1)

    return [lambda n=n: connect(n) for n in range(len(servers))]  # type: ignore[misc]


def test_links_that_break_anywhere_change_no_loss_and_cost_no_second_release(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cutlayer.client.link._FIRST_WAIT_S", 0.001)
    model = six_blocks(tmp_path)
    (tmp_path / "plain").mkdir()
    changes = {"train__save_every": 2, "train__in_flight": 3}
    plain = chain_settings(model, tmp_path / "plain", THREE, **changes)
    with (
        running_hops(model, tmp_path / "plain", THREE) as servers,
        client_of_hops(servers, plain) as client,
    ):
        expected = [record.loss for record in client.train().history]
        vectors = client.ledger.num_vectors
    counts, draw = [0, 0, 0], random.Random(7)
    with running_hops(model, tmp_path, THREE) as servers:
        first, *later = _connects(servers, draw, counts)
        settings = chain_settings(model, tmp_path, THREE, **changes)
        with Client(settings, connect=first, connect_hops=later) as client:
            losses = [record.loss for record in client.train().history]
            assert client.ledger.num_vectors == vectors
    assert losses == pytest.approx(expected, rel=1e-6)
    assert sum(counts) > 10


class _Bare(WrappedChannel):
    """A channel whose replies of one kind are not what was asked for."""

    def __init__(self, inner: Channel, asked: Kind) -> None:
        super().__init__(inner)
        self._asked = asked

    def call(self, frame: Frame, deadline_s: float | None = None) -> "Future[Frame]":
        if frame.kind is not self._asked:
            return self._inner.call(frame, deadline_s)
        self._inner.call(frame, deadline_s).exception()
        bare: Future[Frame] = Future()
        bare.set_result(Frame(kind=Kind.COMMITTED, header=Committed(step=99)))
        return bare


@pytest.mark.parametrize("asked", [Kind.FORWARD, Kind.COMMIT])
def test_a_reply_that_makes_no_sense_is_told_with_the_hops_name(
    tmp_path: Path, asked: Kind
) -> None:
    model = six_blocks(tmp_path)
    settings = chain_settings(model, tmp_path, train__steps=1)
    with running_hops(model, tmp_path) as servers:
        first = partial(loopback, servers[0])
        with (
            Client(
                settings,
                connect=first,
                connect_hops=[lambda: _Bare(loopback(servers[1]), asked)],
            ) as client,
            pytest.raises(ProtocolError, match=r"hop 2 \(127.0.0.1:2\)"),
        ):
            client.train()
