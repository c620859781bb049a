"""The norm of head and tail's gradients leaves only where the trunk clips with it."""

from concurrent.futures import Future
from pathlib import Path

import pytest

from cutlayer import Client
from cutlayer.wire.channel import Channel
from cutlayer.wire.frame import Frame
from cutlayer.wire.messages import Commit, Forward, Step
from tests.tiny_models import tiny_llama_folder
from tests.worlds import client_settings, loopback, running_server, server_settings, write_rows


class _Watched:
    """A channel whose commits are kept."""

    def __init__(self, inner: Channel, told: list[Step]) -> None:
        self._inner, self._told = inner, told

    def __getattr__(self, name: str) -> object:
        return getattr(self._inner, name)

    def call(self, frame: Frame, deadline_s: float | None = None) -> "Future[Frame]":
        if isinstance(frame.header, Forward | Commit) and frame.header.commit is not None:
            self._told.append(frame.header.commit)
        return self._inner.call(frame, deadline_s)


@pytest.mark.parametrize("clip_norm", [None, 1.0])
def test_a_norm_is_told_only_to_clip_with(tmp_path: Path, clip_norm: float | None) -> None:
    model, told = tiny_llama_folder(tmp_path), []
    rows = write_rows(tmp_path / "own.jsonl", 8)
    settings = client_settings(
        model, tmp_path, data__train=str(rows), train__steps=2, train__clip_norm=clip_norm
    )
    with (
        running_server(server_settings(model, tmp_path)) as server,
        Client(settings, connect=lambda: _Watched(loopback(server), told)) as client,
    ):
        client.train()
    assert {step.step for step in told} == {1, 2}
    assert all((step.client_sq_norm > 0) == (clip_norm is not None) for step in told)
