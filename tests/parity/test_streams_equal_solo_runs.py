"""Streams that share calls, guesses and caches give the very tokens of the unsplit model alone."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from cutlayer import Client
from cutlayer.client.decoder import Decoder
from cutlayer.client.settings import SamplingSettings
from cutlayer.client.streams import Finish, NewToken, Request, Stream
from cutlayer.errors import BudgetExceeded, CacheFull
from tests.tiny_models import save_tokenizer, tiny_llama_folder
from tests.worlds import client_of, client_settings, loopback, running_server, server_settings

REPEATING = [65, 66, 67, 68, 69] * 5
PROMPTS = (REPEATING, [90, 91], [100, 101, 102, 103] * 3, [7], list(range(30, 61)))


class Unsplit:
    """Greedy decoding by transformers."""

    def __init__(self, folder: Path) -> None:
        self._model = AutoModelForCausalLM.from_pretrained(folder).eval()

    def __call__(self, prompt: list[int], num_new: int) -> list[int]:
        options = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        with torch.no_grad():
            out = self._model.generate(torch.tensor([prompt]), max_new_tokens=num_new, **options)
        return list(out[0, len(prompt) :].tolist())


@contextmanager
def world(tmp_path: Path, changes: dict[str, object], **limits: object) -> Iterator[Client]:
    """An owner and its server."""
    model = tiny_llama_folder(tmp_path)
    with (
        running_server(server_settings(model, tmp_path, **limits)) as server,
        client_of(server, client_settings(model, tmp_path, **changes)) as client,
    ):
        yield client


@contextmanager
def decoder_of(client: Client) -> Iterator[Decoder]:
    generator = client.generator()
    decoder = generator.decoder(generator.session())
    try:
        yield decoder
    finally:
        decoder.close()


def greedy(prompt: list[int], num_new: int = 12, **options: object) -> Request:
    return Request(
        prompt=prompt,
        sampling=SamplingSettings(max_new_tokens=num_new),
        **options,  # type: ignore[arg-type]
    )


def kinds(name: str, **more: object) -> dict[str, object]:
    return {"generation__speculation": {"kind": name, **more}}


@pytest.mark.parametrize("kind", ["none", "lookup", "self"])
def test_streams_that_come_and_go_equal_the_unsplit_model(tmp_path: Path, kind: str) -> None:
    changes = {**kinds(kind), "generation__prefill_tokens": 4}
    unsplit = Unsplit(tiny_llama_folder(tmp_path))
    with world(tmp_path, changes) as client, decoder_of(client) as decoder:
        streams: list[Stream] = []
        for number, prompt in enumerate(PROMPTS):
            streams.append(decoder.add(greedy(prompt, 5 + 3 * number)))
            decoder.step()
        decoder.finish(streams)
    for number, (prompt, stream) in enumerate(zip(PROMPTS, streams, strict=True)):
        assert stream.tokens == unsplit(prompt, 5 + 3 * number)
        assert stream.finish is Finish.LENGTH


def test_rows_that_are_used_again_keep_their_own_logits(tmp_path: Path) -> None:
    unsplit = Unsplit(tiny_llama_folder(tmp_path))
    changes = {**kinds("none"), "generation__keep_rows": 0}
    with world(tmp_path, changes) as client, decoder_of(client) as decoder:
        first, second = decoder.add(greedy([4, 5], 3)), decoder.add(greedy([90, 91], 14))
        decoder.finish([first])
        # Takes the lower row number, and comes later in the list of streams.
        third = decoder.add(greedy([7, 8, 9], 8))
        decoder.finish([second, third])
    assert second.tokens == unsplit([90, 91], 14)
    assert third.tokens == unsplit([7, 8, 9], 8)


def test_right_guesses_spare_round_trips(tmp_path: Path) -> None:
    # The whole model guesses for itself, so that every guess it makes is right.
    folder = _sure_of_itself(tiny_llama_folder(tmp_path))
    unsplit = Unsplit(folder)
    settings = client_settings(folder, tmp_path, **kinds("model", model=str(folder)))
    with (
        running_server(server_settings(folder, tmp_path)) as server,
        client_of(server, settings) as client,
        decoder_of(client) as decoder,
    ):
        stream = decoder.add(greedy(REPEATING, 40))
        decoder.finish([stream])
        assert decoder.num_saved == stream.num_accepted > 0
    assert stream.tokens == unsplit(REPEATING, 40)
    assert stream.num_round_trips == 40 - stream.num_accepted
    assert stream.num_drafted == stream.num_accepted


def _sure_of_itself(folder: Path) -> Path:
    """Random weights are never sure of a token, and doubtful guesses are not made."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.lm_head.weight.data *= 40
    model.save_pretrained(folder)
    save_tokenizer(folder)
    return folder


def test_sampling_with_guesses_draws_the_same_tokens(tmp_path: Path) -> None:
    sampling = SamplingSettings(max_new_tokens=30, temperature=0.9, top_p=0.95, seed=5)
    found = []
    for kind in ("none", "lookup"):
        with world(tmp_path, kinds(kind)) as client:
            found.append(client.generate_ids([REPEATING, REPEATING], sampling))
    assert found[0] == found[1]
    assert found[0][0] != found[0][1]


def test_a_next_turn_sends_its_new_part_alone(tmp_path: Path) -> None:
    unsplit = Unsplit(tiny_llama_folder(tmp_path))
    with world(tmp_path, {}) as client, decoder_of(client) as decoder:
        first = decoder.add(greedy(REPEATING))
        decoder.finish([first])
        longer = [*REPEATING, *first.tokens, 3, 4, 5]
        before = client.ledger.num_vectors["generation"]
        second = decoder.add(greedy(longer))
        decoder.finish([second])
        released = client.ledger.num_vectors["generation"] - before
    assert second.num_cached == len(longer) - 4
    assert second.tokens == unsplit(longer, 12)
    assert released < len(longer)


def test_a_turn_that_leaves_the_old_path_is_cut_back(tmp_path: Path) -> None:
    unsplit = Unsplit(tiny_llama_folder(tmp_path))
    with world(tmp_path, {}) as client, decoder_of(client) as decoder:
        decoder.finish([decoder.add(greedy(REPEATING))])
        other = [*REPEATING[:7], 1, 2, 3]
        second = decoder.add(greedy(other))
        decoder.finish([second])
    assert second.num_cached == 7
    assert second.tokens == unsplit(other, 12)


@pytest.mark.parametrize("kind", ["none", "lookup", "self"])
def test_with_noise_an_equal_text_releases_nothing_new(tmp_path: Path, kind: str) -> None:
    noisy = {"privacy__mechanism": "gaussian", "privacy__scale": 0.02}
    with world(tmp_path, noisy) as client:
        model = client.generate_ids(PROMPTS, SamplingSettings(max_new_tokens=10))
    with world(tmp_path, {**noisy, **kinds(kind)}) as client:
        before = client.ledger.num_vectors["generation"]
        with decoder_of(client) as decoder:
            streams = [decoder.add(greedy(prompt, 10)) for prompt in PROMPTS]
            decoder.finish(streams)
        wrong = sum(stream.num_drafted - stream.num_accepted for stream in streams)
        assert client.ledger.num_vectors["generation"] - before <= wrong
    assert [stream.tokens for stream in streams] == model


def test_rows_that_the_server_evicts_are_replayed(tmp_path: Path) -> None:
    unsplit = Unsplit(tiny_llama_folder(tmp_path))
    with world(tmp_path, {}) as client:
        room = _bytes_of_rows(client, 2)
    with (
        world(
            tmp_path,
            kinds("none"),
            max_cache_bytes=room,
            max_client_cache_bytes=room,
            evict_after_s=0.01,
        ) as client,
        decoder_of(client) as decoder,
    ):
        streams = [decoder.add(greedy(prompt)) for prompt in PROMPTS]
        decoder.finish(streams)
    for prompt, stream in zip(PROMPTS, streams, strict=True):
        assert stream.tokens == unsplit(prompt, 12)


def _bytes_of_rows(client: Client, num_rows: int) -> int:
    """KV bytes of rows of one block of 64 tokens: 2 blocks of the trunk, float32."""
    config = client._folder.config
    width = config.num_key_value_heads * config.head_dim
    return num_rows * 64 * 2 * 2 * width * 4


def test_a_row_that_never_fits_fails_and_the_others_go_on(tmp_path: Path) -> None:
    unsplit = Unsplit(tiny_llama_folder(tmp_path))
    with world(tmp_path, {}) as client:
        room = _bytes_of_rows(client, 1)
    with (
        world(tmp_path, {}, max_cache_bytes=room, max_client_cache_bytes=room) as client,
        decoder_of(client) as decoder,
    ):
        long = decoder.add(greedy([5] * 80, 4))
        short = decoder.add(greedy([90, 91], 6))
        with pytest.raises(CacheFull):
            decoder.finish([long, short])
        decoder.finish([short])
    assert short.tokens == unsplit([90, 91], 6)


def test_a_conversation_without_budget_does_not_stop_the_others(tmp_path: Path) -> None:
    unsplit = Unsplit(tiny_llama_folder(tmp_path))
    changes = {**kinds("none"), "privacy__generation": {"max_session_vectors": 20}}
    with world(tmp_path, changes) as client, decoder_of(client) as decoder:
        greedy_one, modest = decoder.add(greedy([4, 5, 6], 30)), decoder.add(greedy([90, 91], 9))
        with pytest.raises(BudgetExceeded):
            decoder.finish([greedy_one, modest])
        decoder.finish([modest])
    assert modest.tokens == unsplit([90, 91], 9)
    assert greedy_one.tokens == unsplit([4, 5, 6], 30)[: len(greedy_one.tokens)]
    assert len(greedy_one.tokens) == 18


def test_a_cancelled_stream_releases_nothing_more(tmp_path: Path) -> None:
    with world(tmp_path, kinds("none")) as client, decoder_of(client) as decoder:
        stream = decoder.add(greedy(REPEATING, 30))
        for _ in range(3):
            decoder.step()
        released = client.ledger.num_vectors["generation"]
        decoder.cancel(stream)
        assert decoder.step() is None
        assert client.ledger.num_vectors["generation"] == released
    assert stream.finish is Finish.CANCELLED


def _stops_after(num_tokens: int) -> Callable[[NewToken], bool]:
    seen: list[int] = []

    def watch(new: NewToken) -> bool:
        seen.append(new.token)
        return len(seen) == num_tokens

    return watch


def test_a_watcher_ends_its_stream_within_accepted_guesses(tmp_path: Path) -> None:
    unsplit = Unsplit(tiny_llama_folder(tmp_path))
    prompt = [65, 66, 67, 68, 69] * 8
    with world(tmp_path, kinds("lookup")) as client, decoder_of(client) as decoder:
        for number in range(1, 12):
            stream = decoder.add(greedy(prompt, 40, watch=_stops_after(number)))
            decoder.finish([stream])
            assert stream.finish is Finish.STOP
            assert stream.tokens == unsplit(prompt, number)
        again = decoder.add(greedy([*prompt, *stream.tokens, 9], 10))
        decoder.finish([again])
    assert again.tokens == unsplit([*prompt, *stream.tokens, 9], 10)


def test_logprobs_are_those_of_the_models_softmax(tmp_path: Path) -> None:
    folder = tiny_llama_folder(tmp_path)
    seen: list[NewToken] = []
    with world(tmp_path, {}) as client, decoder_of(client) as decoder:
        watch: Callable[[NewToken], bool] = lambda new: bool(seen.append(new))  # noqa: E731
        decoder.finish([decoder.add(greedy(REPEATING, 5, num_top=3, watch=watch))])
    tokens = [*REPEATING, *(new.token for new in seen)]
    with torch.no_grad():
        logits_NV = AutoModelForCausalLM.from_pretrained(folder)(torch.tensor([tokens])).logits[0]
    logprobs_NV = logits_NV.log_softmax(-1)
    for place, new in enumerate(seen, len(REPEATING) - 1):
        assert new.logprob == pytest.approx(float(logprobs_NV[place, new.token]), abs=1e-4)
        assert [token for token, _ in new.top] == logprobs_NV[place].topk(3).indices.tolist()


def test_a_server_that_restarts_in_mid_stream_gets_the_same_bytes_again(tmp_path: Path) -> None:
    model = tiny_llama_folder(tmp_path)
    unsplit = Unsplit(model)
    with (
        running_server(server_settings(model, tmp_path)) as server,
        running_server(server_settings(model, tmp_path / "second")) as second,
        client_of(server, client_settings(model, tmp_path, **kinds("lookup"))) as client,
        decoder_of(client) as decoder,
    ):
        streams = [decoder.add(greedy(prompt)) for prompt in PROMPTS]
        for _ in range(6):
            decoder.step()
        client.trunk._link._connect = lambda place: loopback(second)
        client.trunk._link._drop_channel()
        decoder.finish(streams)
    for prompt, stream in zip(PROMPTS, streams, strict=True):
        assert stream.tokens == unsplit(prompt, 12)
