"""Clients that generate at one server over frames: long prompts, full memory, idle rows.

Shapes: N = tokens of all rows of a call, D = hidden size.
"""

import threading
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from cutlayer import TrunkServer
from cutlayer.errors import CacheFull, SessionLost
from cutlayer.wire.channel import Channel
from cutlayer.wire.codec import decode, get_codec
from cutlayer.wire.frame import Frame
from cutlayer.wire.messages import (
    CloseSession,
    Decode,
    Hello,
    Kind,
    OpenSession,
    SessionClosed,
    SessionOpened,
)
from tests.tiny_models import tiny_llama_folder
from tests.worlds import loopback, running_server, server_settings

TOKEN_BYTES = 2 * 2 * 2 * 8 * 4
"""Of the tiny trunk: keys and values, blocks, heads, head dimension, bytes of a value."""


class _Member:
    """One client that sends frames by hand."""

    def __init__(self, server: TrunkServer, name: str) -> None:
        self._channel: Channel = loopback(server, name=name)
        model = server.model
        hello = Hello(nonce="00" * 32, spec=model.spec.to_table(), leaves=model.manifest.leaves)
        self._channel.call(Frame(kind=Kind.HELLO, header=hello)).result(5)
        opened = self._channel.call(
            Frame(kind=Kind.OPEN_SESSION, header=OpenSession(max_lengths=[], run_id=None))
        ).result(5)
        assert isinstance(opened.header, SessionOpened)
        self._session_id = opened.header.session_id

    def decode(
        self,
        h_ND: Tensor,
        rows: Sequence[int] = (0,),
        positions: Sequence[int] = (0,),
        max_length: int = 0,
    ) -> Tensor:
        """Equal numbers of tokens for every row; the trunk's output [N, D]."""
        header = Decode(
            session_id=self._session_id,
            rows=list(rows),
            lengths=[len(h_ND) // len(rows)] * len(rows),
            positions=list(positions),
            max_lengths=[max_length] * len(rows) if max_length else [],
        )
        packed = get_codec("raw").encode(h_ND)
        frame = Frame(kind=Kind.DECODE, header=header, tensors={"h": packed})
        return decode(self._channel.call(frame).result(30).tensors["y"])

    def close(self, rows: Sequence[int]) -> int:
        header = CloseSession(session_id=self._session_id, rows=list(rows))
        reply = self._channel.call(Frame(kind=Kind.CLOSE_SESSION, header=header)).result(5).header
        assert isinstance(reply, SessionClosed)
        return reply.bytes_freed


def _random_ND(num_tokens: int, seed: int = 0) -> Tensor:
    return torch.randn(num_tokens, 32, generator=torch.Generator().manual_seed(seed))


def test_long_prompt_keeps_nobody_from_their_next_tokens(tmp_path: Path) -> None:
    batch = {"prefill_tokens": 8, "max_tokens": 32}
    model = tiny_llama_folder(tmp_path)
    with running_server(server_settings(model, tmp_path, batch=batch)) as server:
        prompter, talker = _Member(server, "prompter"), _Member(server, "talker")
        talker.decode(_random_ND(100), max_length=101)
        answers: list[Tensor] = []

        def prefill(rows: Sequence[int]) -> Tensor:
            return prompter.decode(_random_ND(480, seed=1), rows, [0] * 4, max_length=120)

        def send_prompt() -> None:
            answers.append(prefill([0, 1, 2, 3]))

        thread = threading.Thread(target=send_prompt)
        thread.start()
        num_steps = 0
        while thread.is_alive():
            num_steps += 1
            talker.decode(_random_ND(1), positions=[100])
        again = prefill([4, 5, 6, 7])
    # 60 pieces; the talker rode along with most of them.
    assert num_steps > 20
    torch.testing.assert_close(answers[0], again, rtol=1e-4, atol=1e-5)


def test_idle_rows_give_way_are_replayed_and_closed_ones_free_their_memory(
    tmp_path: Path,
) -> None:
    limits = {"max_cache_bytes": 3 * 64 * TOKEN_BYTES, "evict_after_s": 0.1}
    model = tiny_llama_folder(tmp_path)
    with running_server(server_settings(model, tmp_path, **limits)) as server:
        first, second = _Member(server, "first"), _Member(server, "second")
        before = first.decode(_random_ND(20), rows=[0, 5], positions=[0, 0], max_length=60)
        with pytest.raises(CacheFull, match="ask again in") as full:
            second.decode(_random_ND(100), max_length=100)
        assert full.value.retry_after_s is not None
        time.sleep(full.value.retry_after_s + 0.02)
        second.decode(_random_ND(100), max_length=100)
        with pytest.raises(SessionLost) as lost:
            first.decode(_random_ND(2), rows=[0, 5], positions=[10, 10])
        assert len(lost.value.lost_rows) == 1
        assert second.close([0, 7]) == 100 * TOKEN_BYTES
        again = first.decode(_random_ND(20), rows=[0, 5], positions=[0, 0], max_length=60)
        assert torch.equal(again, before)
        metrics = server.metrics().decode()
    assert "cutlayer_evicted_rows 1.0" in metrics
    assert "cutlayer_session_rows 2.0" in metrics
    assert f"cutlayer_cache_bytes {2 * 60 * TOKEN_BYTES:.1f}" in metrics
    assert "cutlayer_decode_tokens_total 140.0" in metrics
