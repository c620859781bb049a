"""What a server sees of a re-cut: nothing of its owner's blocks without consent, and then no more
than the blocks that move."""

from collections.abc import Mapping
from concurrent.futures import Future
from pathlib import Path

import pytest

from cutlayer import Client
from cutlayer.errors import ConfigError
from cutlayer.model.moved_blocks import block_of
from cutlayer.wire.channel import Channel
from cutlayer.wire.frame import Frame
from cutlayer.wire.messages import Kind
from cutlayer.wire.recut_messages import split_tensors
from tests.recut_worlds import owner, wide_server
from tests.tiny_models import tiny_llama_folder
from tests.worlds import loopback, running_server, server_settings


class _Watched:
    """A channel that keeps what is sent up."""

    def __init__(self, channel: Channel, sent: list[Frame]) -> None:
        self._channel, self._sent = channel, sent

    @property
    def bytes_sent(self) -> int:
        return self._channel.bytes_sent

    @property
    def bytes_received(self) -> int:
        return self._channel.bytes_received

    def call(self, frame: Frame, deadline_s: float | None = None) -> "Future[Frame]":
        self._sent.append(frame)
        return self._channel.call(frame, deadline_s)

    def close(self) -> None:
        self._channel.close()


def _moved_blocks(frame: Frame) -> set[int]:
    found: tuple[Mapping[str, object], Mapping[str, object]] | None = split_tensors(frame.tensors)
    assert found is not None
    return {block_of(key) for state in found for key in state}


def test_a_server_sees_the_moved_blocks_alone_and_only_after_consent(tmp_path: Path) -> None:
    model, sent = tiny_llama_folder(tmp_path), list[Frame]()
    settings = owner(model, tmp_path, train__steps=2)
    with (
        running_server(wide_server(model, tmp_path)) as server,
        Client(settings, connect=lambda: _Watched(loopback(server), sent)) as client,
    ):
        client.train()
        sent.clear()
        with pytest.raises(ConfigError, match="--share-adapter"):
            client.recut(lower=0)
        assert sent == []
        client.recut(lower=2)
        down = [frame for frame in sent if frame.kind is Kind.RECUT]
        assert down
        assert all(not frame.tensors for frame in down)
        sent.clear()
        client.recut(lower=1, upper=4, share_adapter=True)
        up = [frame for frame in sent if frame.kind is Kind.RECUT]
        assert up
        assert all(_moved_blocks(frame) == {1, 3} for frame in up)
        assert {frame.kind for frame in sent} == {Kind.HELLO, Kind.RECUT}


def test_a_cut_that_the_server_does_not_serve_is_shown_no_adapter(tmp_path: Path) -> None:
    model, sent = tiny_llama_folder(tmp_path), list[Frame]()
    narrow = server_settings(model, tmp_path)
    settings = owner(model, tmp_path, train__steps=2)
    with (
        running_server(narrow) as server,
        Client(settings, connect=lambda: _Watched(loopback(server), sent)) as client,
    ):
        client.train()
        sent.clear()
        with pytest.raises(ConfigError, match="lower"):
            client.recut(lower=0, share_adapter=True)
        assert [frame.kind for frame in sent] == [Kind.HELLO]
