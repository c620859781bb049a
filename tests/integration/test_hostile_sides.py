"""Either side may be hostile or wrong: each case ends in one clear error, and others go on."""

from pathlib import Path

import pytest
import torch

from cutlayer.client.sampling import RowSampler
from cutlayer.client.session import Feed
from cutlayer.client.settings import SamplingSettings
from cutlayer.errors import ConfigError, ProtocolError, SpecMismatch
from cutlayer.wire.codec import get_codec
from cutlayer.wire.frame import Frame
from cutlayer.wire.messages import Decoded, Forward, Kind
from tests.tiny_models import tiny_llama_folder
from tests.worlds import client_of, client_settings, loopback, running_server, server_settings

PROMPT = [65, 66, 67]
SHORT = SamplingSettings(max_new_tokens=3)


def test_a_refused_server_gets_no_later_call_either(tmp_path: Path) -> None:
    model = tiny_llama_folder(tmp_path)
    pinned = client_settings(model, tmp_path, model__digest="00" * 32)
    with running_server(server_settings(model, tmp_path)) as server:
        channel = loopback(server)
        with client_of(server, pinned) as client:
            client.trunk._link._connect = lambda place: channel
            with pytest.raises(SpecMismatch, match="digest"):
                client.generate_ids([PROMPT], SHORT)
            sent = channel.bytes_sent
            client.trunk._link._connect = lambda place: loopback(server)
            with pytest.raises(SpecMismatch, match="digest"):
                client.generate_ids([PROMPT], SHORT)
        assert channel.bytes_sent == sent


def test_an_adapter_of_absurd_rank_is_refused_before_it_is_allocated(tmp_path: Path) -> None:
    model = tiny_llama_folder(tmp_path)
    settings = client_settings(model, tmp_path, adapter__rank=8)
    with (
        running_server(server_settings(model, tmp_path, max_adapter_rank=4)) as server,
        client_of(server, settings) as client,
        pytest.raises(ConfigError, match="rank=8 exceeds 4"),
    ):
        client.train()


def test_a_call_with_too_many_tokens_is_refused_and_the_next_one_served(tmp_path: Path) -> None:
    model = tiny_llama_folder(tmp_path)
    with (
        running_server(server_settings(model, tmp_path, max_call_tokens=8)) as server,
        client_of(server, client_settings(model, tmp_path)) as client,
    ):
        with pytest.raises(ProtocolError, match="at most 8 tokens"):
            client.generate_ids([PROMPT * 4], SHORT)
        assert len(client.generate_ids([PROMPT], SHORT)[0]) == 3


def test_a_step_of_endless_micro_batches_is_refused(tmp_path: Path) -> None:
    model = tiny_llama_folder(tmp_path)
    settings = client_settings(model, tmp_path, train__micro_batch_rows=1, train__in_flight=8)
    with (
        running_server(server_settings(model, tmp_path, max_micro_batches=2)) as server,
        client_of(server, settings) as client,
        pytest.raises(ProtocolError, match="more than 2 micro-batches"),
    ):
        client.train()


def test_lengths_that_do_not_fit_the_tensor_are_refused(tmp_path: Path) -> None:
    model = tiny_llama_folder(tmp_path)
    with (
        running_server(server_settings(model, tmp_path)) as server,
        client_of(server, client_settings(model, tmp_path)) as client,
    ):
        client.train()
        channel = client.trunk._link._channel
        assert channel is not None
        call = Forward(run_id=client.run_id, step=7, micro=0, lengths=[10**9])
        packed = get_codec("raw").encode(torch.zeros(2, 32))
        with pytest.raises(ProtocolError, match="the rows need"):
            channel.call(Frame(kind=Kind.FORWARD, header=call, tensors={"h": packed})).result()
        assert len(client.generate_ids([PROMPT], SHORT)[0]) == 3


@pytest.mark.parametrize("shape", [(2, 32), (3, 31), (3,)])
def test_a_reply_of_another_shape_is_refused(tmp_path: Path, shape: tuple[int, ...]) -> None:
    model = tiny_llama_folder(tmp_path)
    with (
        running_server(server_settings(model, tmp_path)) as server,
        client_of(server, client_settings(model, tmp_path)) as client,
    ):
        session = client.session([8])
        session.step([Feed(row=0, tokens=[5])])
        reply = Frame(
            kind=Kind.DECODED,
            header=Decoded(),
            tensors={"y": get_codec("raw").encode(torch.zeros(shape))},
        )
        client.trunk._link._wait = lambda call: reply  # type: ignore[method-assign]
        with pytest.raises(ProtocolError, match="shape"):
            session.step([Feed(row=0, tokens=PROMPT)])


def test_three_runs_of_one_owner_stay_in_memory_together(tmp_path: Path) -> None:
    model = tiny_llama_folder(tmp_path)
    with running_server(server_settings(model, tmp_path, max_client_runs=4)) as server:
        for number in range(3):
            settings = client_settings(model, tmp_path, run__folder=str(tmp_path / f"run{number}"))
            with client_of(server, settings) as client:
                client.train()
        assert len(server._host.runs()) == 3


@pytest.mark.parametrize("temperature", [1e-42, 1e-39, 1e-3])
def test_the_coldest_temperature_is_greedy_and_never_fails(temperature: float) -> None:
    logits_V = torch.tensor([1.0, 30.0, -2.0])
    sampler = RowSampler(SamplingSettings(temperature=temperature, seed=10**14), row=0)
    assert sampler.next_token(logits_V, []) == 1


def test_a_prompt_longer_than_the_context_is_named_before_anything_leaves(tmp_path: Path) -> None:
    model = tiny_llama_folder(tmp_path)
    with (
        running_server(server_settings(model, tmp_path)) as server,
        client_of(server, client_settings(model, tmp_path)) as client,
    ):
        with pytest.raises(ConfigError, match="context of 128"):
            client.generate_ids([PROMPT * 60], SHORT)
        assert client.ledger.num_lines == 0
