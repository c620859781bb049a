"""A server that answers a re-cut with what cannot be, or that was caught lying before."""

from collections.abc import Callable, Mapping
from concurrent.futures import Future
from pathlib import Path

import pytest
import torch

from cutlayer import Client
from cutlayer.errors import PeerMisbehaved, ProtocolError
from cutlayer.wire.channel import Channel
from cutlayer.wire.codec import Packed, decode, get_codec
from cutlayer.wire.frame import Frame
from cutlayer.wire.messages import Kind
from cutlayer.wire.recut_messages import RecutDone
from cutlayer.wire.wrapped import WrappedChannel
from tests.recut_worlds import adapters_of, owner, wide_server
from tests.tiny_models import tiny_llama_folder
from tests.worlds import loopback, running_server

Tensors = dict[str, Packed]
Lie = Callable[[Tensors], None]


class _Lying(WrappedChannel):
    """Answers RECUT with another frame than the server's; keeps the kinds that came up."""

    def __init__(self, inner: Channel, lies: list[Callable[[Frame], Frame]], sent: list[Kind]):
        super().__init__(inner)
        self._lies, self._sent = lies, sent

    def call(self, frame: Frame, deadline_s: float | None = None) -> "Future[Frame]":
        self._sent.append(frame.kind)
        answer = self._inner.call(frame, deadline_s)
        if frame.kind is not Kind.RECUT or not self._lies:
            return answer
        lied: Future[Frame] = Future()
        lied.set_result(self._lies[-1](answer.result()))
        return lied


def _about(change: Lie) -> Callable[[Frame], Frame]:
    def lie(frame: Frame) -> Frame:
        tensors: Tensors = dict(frame.tensors)
        change(tensors)
        return Frame(kind=frame.kind, header=frame.header, tensors=tensors)

    return lie


def _changed(part: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Frame], Frame]:
    """The first tensor with this in its name is another one."""

    def lie(tensors: Tensors) -> None:
        name = next(name for name in sorted(tensors) if part in name)
        tensors[name] = get_codec("raw").encode(change(decode(tensors[name]).clone()))

    return _about(lie)


def _renamed(tensors: Tensors) -> None:
    name = next(iter(tensors))
    tensors[name.replace("layers.1.", "layers.3.")] = tensors.pop(name)


LIES: Mapping[str, Callable[[Frame], Frame]] = {
    "NaN": _changed("adapter/", lambda x: x * torch.nan),
    "infinite": _changed("exp_avg", lambda x: x + torch.inf),
    "AdamW never has": _changed("exp_avg_sq", lambda x: x - 1.0),
    "expected is float32": _changed("adapter/", lambda x: x.repeat(100, 100)),
    "as torch.bfloat16": _changed("moment/", lambda x: x.bfloat16()),
    "other weights": _about(_renamed),
    r"other weights.*": _about(lambda tensors: tensors.clear()),
    "which it cannot have": _about(lambda tensors: tensors.update(h=next(iter(tensors.values())))),
    "another step": lambda frame: Frame(
        kind=frame.kind, header=RecutDone(step=1), tensors=frame.tensors
    ),
}


def test_no_lie_about_a_recut_gets_into_the_run(tmp_path: Path) -> None:
    model, lies, sent = tiny_llama_folder(tmp_path), list[Callable[[Frame], Frame]](), list[Kind]()
    settings = owner(model, tmp_path, train__steps=2)
    with (
        running_server(wide_server(model, tmp_path)) as server,
        Client(settings, connect=lambda: _Lying(loopback(server), lies, sent)) as client,
    ):
        client.train()
        before, run_id = adapters_of(client), client.run_id
        for message, lie in LIES.items():
            lies[:] = [lie]
            with pytest.raises(ProtocolError, match=message):
                client.recut(lower=2)
            assert not (settings.run.folder / "steps.c1").exists()
        lies.clear()
        assert client.run_id == run_id
        client.recut(lower=2)
        after = adapters_of(client)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_a_server_that_was_caught_lying_is_shown_no_adapter(tmp_path: Path) -> None:
    model, sent = tiny_llama_folder(tmp_path), list[Kind]()
    settings = owner(model, tmp_path, train__steps=2)
    with (
        running_server(wide_server(model, tmp_path)) as server,
        Client(settings, connect=lambda: _Lying(loopback(server), [], sent)) as client,
    ):
        client.train()
        with pytest.raises(PeerMisbehaved):
            client.trunk.checks._judge("zeros", "output of step 3", 3)
        sent.clear()
        with pytest.raises(PeerMisbehaved):
            client.recut(lower=0, share_adapter=True)
        assert sent == []
        assert "adapters" not in client.ledger.num_vectors
