"""What a second trunk host costs: the same bytes and one round trip more per call."""

from collections import Counter
from pathlib import Path

import pytest

from cutlayer import Client
from cutlayer.client.chain_trunk import ChainTrunk
from cutlayer.client.remote_trunk import RemoteTrunk
from cutlayer.client.settings import SamplingSettings
from cutlayer.wire.messages import Kind
from tests.chain_worlds import chain_settings, client_of_hops, hop_server, running_hops, six_blocks
from tests.worlds import client_of, client_settings, running_server


def _used(client: Client) -> tuple[Counter[Kind], int, int]:
    """Calls, bytes up and bytes down of a training and of 10 tokens of a reply."""
    calls: Counter[Kind] = Counter()
    is_chain = isinstance(client.trunk, ChainTrunk)
    trunks: tuple[RemoteTrunk, ...] = client.trunk.hops if is_chain else (client.trunk,)  # type: ignore[attr-defined]
    for trunk in trunks:
        trunk.hello()
        channel = trunk._link._channel
        assert channel is not None
        plain = channel.call

        def call(frame, *rest, plain=plain):  # type: ignore[no-untyped-def]
            calls[frame.kind] += 1
            return plain(frame, *rest)

        channel.call = call  # type: ignore[method-assign]
    client.train()
    client.generate_ids([[70, 80, 90]], SamplingSettings(max_new_tokens=10))
    return calls, client.trunk.bytes_sent, client.trunk.bytes_received


def test_a_second_hop_doubles_calls_and_bytes(tmp_path: Path) -> None:
    model = six_blocks(tmp_path)
    folder, plain = str(tmp_path / "one"), {"generation__speculation": {"kind": "none"}}
    whole = client_settings(model, tmp_path, model__upper=5, run__folder=folder, **plain)
    with (
        running_server(hop_server(model, tmp_path / "whole", 1, 5)) as server,
        client_of(server, whole) as client,
    ):
        calls, up, down = _used(client)
    with (
        running_hops(model, tmp_path) as servers,
        client_of_hops(servers, chain_settings(model, tmp_path, **plain)) as client,
    ):
        chained, chained_up, chained_down = _used(client)
    assert calls[Kind.FORWARD] == 18
    assert calls[Kind.DECODE] == 10
    assert chained == Counter({kind: 2 * number for kind, number in calls.items()})
    assert chained_up / up == pytest.approx(2, rel=0.02)
    assert chained_down / down == pytest.approx(2, rel=0.02)
