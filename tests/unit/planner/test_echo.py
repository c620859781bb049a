"""An echo stands in for a trunk: the real client trains and saves against it."""

from pathlib import Path

from cutlayer import Client, SamplingSettings
from cutlayer.planner.echo import EchoService
from cutlayer.wire.channel import LoopbackChannel, Peer
from tests.tiny_models import tiny_llama_folder
from tests.worlds import client_settings

_PEER = Peer(name="clinic", roles=frozenset(), serial=None, address="test")


def test_a_client_trains_and_generates_against_an_echo(tmp_path: Path) -> None:
    settings = client_settings(tiny_llama_folder(tmp_path), tmp_path)
    service = EchoService({})
    with Client(settings, connect=lambda: LoopbackChannel(service, _PEER)) as client:
        progress = client.train()
        assert progress.step == 6
        assert len(client.generate_ids([[1, 2, 3]], SamplingSettings(max_new_tokens=4))[0]) == 4
        assert client.ledger.num_releases > 0
