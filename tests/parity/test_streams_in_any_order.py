"""Whatever comes, goes, breaks or is lost in whatever order: tokens stay those of the model alone.

Each scenario is drawn from a seed. What crosses the wire is recorded: the ledger counts no less.
"""

import random
import time
from concurrent.futures import Future
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from cutlayer import Client
from cutlayer.client.decoder import Decoder
from cutlayer.client.settings import SamplingSettings
from cutlayer.client.streams import Finish, Request, Stream
from cutlayer.errors import BudgetExceeded, CacheFull, TransportError
from cutlayer.server.server import TrunkServer
from cutlayer.wire.channel import Channel
from cutlayer.wire.frame import Frame
from cutlayer.wire.messages import Decode, OpenSession
from tests.tiny_models import tiny_llama_folder
from tests.worlds import client_settings, loopback, running_server, server_settings

_MAX_NEW = 24
_ROW_BYTES = 64 * 2 * 2 * 16 * 4
"""KV of 64 tokens in the trunk's two blocks: keys and values of 16 floats."""
_PATIENCE_S = 30.0


class Unsplit:
    """Greedy decoding by transformers, each prompt once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._model = AutoModelForCausalLM.from_pretrained(folder).eval()
        self._known: dict[tuple[int, ...], list[int]] = {}

    def __call__(self, prompt: list[int]) -> list[int]:
        key = tuple(prompt)
        if key not in self._known:
            with torch.no_grad():
                out = self._model.generate(
                    torch.tensor([prompt]),
                    attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
                    max_new_tokens=_MAX_NEW,
                    do_sample=False,
                    eos_token_id=None,
                )
            self._known[key] = list(out[0, len(prompt) :].tolist())
        return self._known[key]

    def reply_to(self, request: Request) -> list[int]:
        """What a request gets if nothing ends it early."""
        reply = self(list(request.prompt))[: request.sampling.max_new_tokens]
        ends = [place for place, token in enumerate(reply) if token in request.eos_ids]
        return reply[: ends[0]] if ends else reply


class Wire:
    """What the servers got to see, over links that break now and then, some for a new server."""

    def __init__(self, draw: random.Random, break_rate: float, servers: list[TrunkServer]) -> None:
        self.seen: set[tuple[int, bytes]] = set()
        self._servers = servers
        self._draw = draw
        self._break_rate = break_rate

    def record(self, frame: Frame, header: Decode) -> None:
        h = frame.tensors["h"]
        raw = b"".join(bytes(buffer) for buffer in h.buffers)
        size = len(raw) // h.shape[0]
        places = [
            position + index
            for position, length in zip(header.positions, header.lengths, strict=True)
            for index in range(length)
        ]
        for number, place in enumerate(places):
            self.seen.add((place, raw[number * size : (number + 1) * size]))

    def breaks(self) -> bool:
        if self._draw.random() >= self._break_rate:
            return False
        if self._draw.random() < 0.5:
            self._servers.reverse()
        return True

    def is_late(self) -> bool:
        """Whether the server has had the call that is lost."""
        return self._draw.random() < 0.5


class BreakingChannel:
    """Loses calls, some of them before and some after the server has had them."""

    def __init__(self, channel: Channel, wire: Wire) -> None:
        self._channel = channel
        self._wire = wire

    @property
    def bytes_sent(self) -> int:
        return self._channel.bytes_sent

    @property
    def bytes_received(self) -> int:
        return self._channel.bytes_received

    def call(self, frame: Frame, deadline_s: float | None = None) -> "Future[Frame]":
        if isinstance(frame.header, Decode):
            self._wire.record(frame, frame.header)
        if not isinstance(frame.header, Decode | OpenSession) or not self._wire.breaks():
            return self._channel.call(frame, deadline_s)
        if self._wire.is_late():
            self._channel.call(frame, deadline_s)
        lost: Future[Frame] = Future()
        lost.set_exception(TransportError("the link broke"))
        return lost

    def close(self) -> None:
        self._channel.close()


class Scenario:
    """Draws what happens next; remembers all streams."""

    def __init__(self, draw: random.Random, unsplit: Unsplit, decoder: Decoder) -> None:
        self._draw = draw
        self._unsplit = unsplit
        self._decoder = decoder
        self.streams: list[Stream] = []

    def add(self) -> None:
        draw, prompt = self._draw, self._prompt()[:90]
        ends = frozenset(draw.sample(self._unsplit(prompt), 1)) if draw.random() < 0.2 else None
        late_s = time.monotonic() + 0.2 * draw.random() if draw.random() < 0.1 else None
        sampling = SamplingSettings(max_new_tokens=draw.randint(1, _MAX_NEW))
        request = Request(
            prompt=prompt, sampling=sampling, eos_ids=ends or frozenset(), deadline_s=late_s
        )
        self.streams.append(self._decoder.add(request))

    def cancel(self) -> None:
        if self.streams:
            self._decoder.cancel(self._draw.choice(self.streams))

    def step(self) -> None:
        self._decoder.step()

    def _prompt(self) -> list[int]:
        draw = self._draw
        if self.streams and draw.random() < 0.5:
            stream = draw.choice(self.streams)
            text = [*stream.request.prompt, *stream.tokens]
            end = draw.choice([len(text), draw.randint(1, len(text))])
            return [*text[:end], *(draw.randint(60, 70) for _ in range(draw.randint(1, 8)))]
        if draw.random() < 0.5:
            return [65, 66, 67, 68, 69] * draw.randint(1, 6)
        return [draw.randint(1, 255) for _ in range(draw.randint(1, 40))]


def _changes(draw: random.Random) -> dict[str, object]:
    changes: dict[str, object] = {
        "generation__speculation": {"kind": draw.choice(["none", "lookup", "self"])},
        "generation__prefill_tokens": draw.choice([2, 5, 16, 256]),
        "generation__max_streams": draw.choice([1, 2, 4, 32]),
        "generation__keep_rows": draw.choice([0, 1, 3, 8]),
        "generation__keep_s": draw.choice([0.02, 300.0]),
    }
    if draw.random() < 0.3:
        changes |= {"privacy__mechanism": "gaussian", "privacy__scale": 0.02}
    if draw.random() < 0.3:
        limits = {"max_session_vectors": 40, "max_day_vectors": draw.choice([60, 400])}
        changes["privacy__generation"] = limits
    return changes


def _limits(draw: random.Random) -> dict[str, object]:
    if draw.random() < 0.5:
        return {}
    room = draw.choice([1, 2, 3]) * _ROW_BYTES
    return {"max_cache_bytes": room, "max_client_cache_bytes": room, "evict_after_s": 0.005}


@pytest.fixture(scope="module")
def unsplit(tmp_path_factory: pytest.TempPathFactory) -> Unsplit:
    return Unsplit(tiny_llama_folder(tmp_path_factory.mktemp("model")))


@pytest.mark.parametrize("seed", range(12))
def test_tokens_and_counts_are_right_whatever_happens(
    tmp_path: Path, unsplit: Unsplit, seed: int
) -> None:
    draw = random.Random(seed)
    limits, changes = _limits(draw), _changes(draw)
    break_rate = draw.choice([0.0, 0.05])
    with (
        running_server(server_settings(unsplit.folder, tmp_path, **limits)) as first,
        running_server(server_settings(unsplit.folder, tmp_path / "2", **limits)) as second,
    ):
        servers = [first, second]
        wire = Wire(draw, break_rate, servers)
        settings = client_settings(unsplit.folder, tmp_path, **changes)
        connect = lambda: BreakingChannel(loopback(servers[0]), wire)  # noqa: E731
        with Client(settings, connect=connect) as client:
            streams = _play(draw, unsplit, client, servers)
            counted = client.ledger.num_vectors.get("generation", 0)
    assert counted >= len(wire.seen)
    for stream in streams:
        _check(stream, None if "privacy__mechanism" in changes else unsplit)


def _play(
    draw: random.Random, unsplit: Unsplit, client: Client, servers: list[TrunkServer]
) -> list[Stream]:
    generator = client.generator()
    session = generator.session()
    decoder = generator.decoder(session)
    scenario, link = Scenario(draw, unsplit, decoder), client.trunk._link

    def swap() -> None:
        servers.reverse()
        link._drop_channel()

    events = [scenario.add, scenario.cancel, link._drop_channel, swap, scenario.step]
    for _ in range(draw.randint(10, 50)):
        draw.choices(events, weights=[20, 6, 4, 4, 66])[0]()
    until_s = time.monotonic() + _PATIENCE_S
    while decoder.step() is not None:
        assert time.monotonic() < until_s
    kept = decoder._kept._rows
    assert {row.row for row in kept} == set(session._rows)
    assert all(session.length(row.row) == len(row.tokens) for row in kept)
    assert link._open_calls == []
    decoder.close()
    return scenario.streams


def _check(stream: Stream, unsplit: Unsplit | None) -> None:
    assert stream.has_ended
    assert stream.num_accepted <= stream.num_drafted
    if stream.finish is Finish.ERROR:
        assert isinstance(stream.error, BudgetExceeded | CacheFull)
    if unsplit is not None:
        right = unsplit.reply_to(stream.request)
        is_whole = stream.finish in (Finish.STOP, Finish.LENGTH)
        assert stream.tokens == (right if is_whole else right[: len(stream.tokens)])
