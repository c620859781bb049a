"""`cutlayer serve` and `cutlayer api` as processes with mutual TLS, and the official client."""

import concurrent.futures
import json
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import openai
import pytest
import torch
from transformers import AutoTokenizer, PreTrainedModel

from cutlayer.demo.processes import serving
from tests.tiny_models import tiny_model
from tests.unit.cli.cli_world import CliWorld, make_world

MODEL = "tiny-llama"
Table = dict[str, object]


class ApiProcess:
    """`cutlayer api` at work."""

    def __init__(self, world: CliWorld, address: str, *changes: str) -> None:
        wanted = (f"connection.address={address}", "api.drain_s=5", *changes)
        words = [word for change in wanted for word in ("--set", change)]
        command = (sys.executable, "-m", "cutlayer.cli.main", "api", "-c", str(world.client))
        with (world.folder / "api.log").open("wb") as log:
            self.process = subprocess.Popen(
                [*command, "--port", "0", "--json", *words],
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, (world.folder / "api.log").read_text()
        self.ready: Table = json.loads(line)

    def client(self, key: str = "unused") -> openai.OpenAI:
        """The official client."""
        return openai.OpenAI(base_url=str(self.ready["base_url"]), api_key=key, max_retries=0)

    def status(self) -> dict[str, float]:
        """What the page shows."""
        with urllib.request.urlopen(f"{self.ready['url']}/status", timeout=10) as answer:
            table = json.loads(answer.read())
        assert isinstance(table, dict)
        return table

    def end(self) -> int:
        """SIGTERM; the exit code."""
        self.process.send_signal(signal.SIGTERM)
        self.process.communicate(timeout=60)
        return self.process.returncode


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, PreTrainedModel]:
    return tiny_model("llama", tmp_path_factory.mktemp("model"))


@contextmanager
def _api(world: CliWorld, address: str, *changes: str) -> Iterator[ApiProcess]:
    api = ApiProcess(world, address, *changes)
    try:
        yield api
    finally:
        if api.process.poll() is None:
            assert api.end() == 0, (world.folder / "api.log").read_text()


@pytest.fixture(scope="module")
def world(tiny: tuple[Path, PreTrainedModel], tmp_path_factory: pytest.TempPathFactory) -> CliWorld:
    return make_world(tiny[0], tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def address(world: CliWorld) -> Iterator[str]:
    with serving(world.server, world.folder) as server:
        yield server.address


@pytest.fixture(scope="module")
def api(world: CliWorld, address: str) -> Iterator[ApiProcess]:
    with _api(world, address) as running:
        yield running


@pytest.fixture
def client(api: ApiProcess) -> Iterator[openai.OpenAI]:
    with api.client() as made:
        yield made


def _greedy(tiny: tuple[Path, PreTrainedModel], text: str, num_new: int) -> str:
    folder, model = tiny
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokens = list(tokenizer(text, add_special_tokens=False)["input_ids"])
    start = len(tokens)
    with torch.no_grad():
        for _ in range(num_new):
            tokens.append(int(model(torch.tensor([tokens])).logits[0, -1].argmax()))
            if tokens[-1] == 256:
                break
    return str(tokenizer.decode(tokens[start:], skip_special_tokens=True))


def test_a_chat_over_the_cut_is_the_plain_models(
    client: openai.OpenAI, tiny: tuple[Path, PreTrainedModel]
) -> None:
    assert [model.id for model in client.models.list()] == [MODEL]
    made = client.chat.completions.create(
        model=MODEL, messages=[{"role": "user", "content": "hello"}], max_tokens=16, temperature=0
    )
    wanted = _greedy(tiny, "<|user|>hello<|end|><|assistant|>", 16)
    assert made.choices[0].message.content == wanted


def test_eight_streams_at_once_are_each_their_own(
    api: ApiProcess, client: openai.OpenAI, tiny: tuple[Path, PreTrainedModel]
) -> None:
    before = api.status()

    def ask(letter: str) -> str:
        made = client.completions.create(
            model=MODEL, prompt=letter * 5, max_tokens=20, temperature=0, stream=True
        )
        return "".join(chunk.choices[0].text for chunk in made)

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        replies = list(pool.map(ask, "abcdefgh"))
    assert replies == [_greedy(tiny, letter * 5, 20) for letter in "abcdefgh"]
    after = api.status()
    num_tokens = after["num_tokens"] - before["num_tokens"]
    # They share the calls of the trunk.
    assert after["num_round_trips"] - before["num_round_trips"] < 0.7 * num_tokens
    assert after["bytes_up"] > before["bytes_up"]
    assert after["num_vectors_released"] > before["num_vectors_released"]


def test_a_next_turn_finds_the_last_one_cached(client: openai.OpenAI) -> None:
    turns: list[dict[str, str]] = [{"role": "user", "content": "a first message"}]
    asked = {"model": MODEL, "max_tokens": 6, "temperature": 0}
    first = client.chat.completions.create(messages=turns, **asked)
    turns += [{"role": "assistant", "content": str(first.choices[0].message.content)}]
    turns += [{"role": "user", "content": "more"}]
    second = client.chat.completions.create(messages=turns, **asked)
    assert second.usage is not None
    assert second.usage.prompt_tokens_details.cached_tokens >= first.usage.prompt_tokens - 1


def test_seeds_scores_and_several_replies_cross_the_cut(client: openai.OpenAI) -> None:
    asked = {"model": MODEL, "prompt": "abc", "n": 3, "max_tokens": 8, "temperature": 1.2}
    first = client.completions.create(**asked, seed=5, logprobs=2)
    again = client.completions.create(**asked, seed=5)
    assert [c.text for c in first.choices] == [c.text for c in again.choices]
    assert len({c.text for c in first.choices}) == 3
    for choice in first.choices:
        assert choice.logprobs is not None
        assert all(logprob <= 0 for logprob in choice.logprobs.token_logprobs or [0])
        assert len(choice.logprobs.top_logprobs or []) == len(choice.logprobs.tokens or [])


def test_closing_a_stream_releases_no_more_vectors(api: ApiProcess, client: openai.OpenAI) -> None:
    stream = client.completions.create(
        model=MODEL, prompt="abc", max_tokens=120, n=4, temperature=1.9, stream=True
    )
    next(stream)
    stream.close()
    deadline_s = time.monotonic() + 10
    while api.status()["num_streams"] and time.monotonic() < deadline_s:
        time.sleep(0.02)
    before = api.status()
    assert before["num_streams"] == before["num_replies"] == 0
    time.sleep(0.3)
    assert api.status()["num_vectors_released"] == before["num_vectors_released"]


def test_errors_are_the_official_clients_classes(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as too_long:
        client.completions.create(model=MODEL, prompt="a" * 500)
    assert too_long.value.code == "context_length_exceeded"
    with pytest.raises(openai.NotFoundError):
        client.completions.create(model="other", prompt="a")


def test_a_token_a_budget_and_an_end_that_lets_a_reply_finish(
    world: CliWorld, address: str, tiny: tuple[Path, PreTrainedModel], tmp_path: Path
) -> None:
    changes = (
        f"run.folder={tmp_path / 'run'}",
        f"api.token_file={tmp_path / 'token'}",
        "privacy.generation.max_day_vectors=110",
        'generation.speculation.kind="none"',
    )
    with _api(world, address, *changes) as api:
        key = (tmp_path / "token").read_text().strip()
        with api.client("wrong") as stranger, pytest.raises(openai.AuthenticationError):
            stranger.models.list()
        with api.client(key) as client:
            with pytest.raises(openai.PermissionDeniedError) as caught:
                client.completions.create(model=MODEL, prompt="x" * 120, max_tokens=4)
            assert caught.value.code == "privacy_budget_exceeded"
            stream = client.completions.create(
                model=MODEL, prompt="abc", max_tokens=60, temperature=0, stream=True
            )
            text = next(stream).choices[0].text
            api.process.send_signal(signal.SIGTERM)
            text += "".join(chunk.choices[0].text for chunk in stream)
        assert text == _greedy(tiny, "abc", 60)
        api.process.communicate(timeout=30)
        assert api.process.returncode == 0


def test_a_server_that_is_away_keeps_nobody_beyond_the_deadline(
    tiny: tuple[Path, PreTrainedModel], tmp_path: Path
) -> None:
    world = make_world(tiny[0], tmp_path)
    api = ApiProcess(world, "127.0.0.1:1", "connection.connect_timeout_s=1", "api.deadline_s=2")
    try:
        with api.client() as client:
            began_s = time.monotonic()
            with pytest.raises(openai.InternalServerError) as caught:
                client.completions.create(model=MODEL, prompt="abc", max_tokens=2)
            assert time.monotonic() - began_s < 10
            assert caught.value.code in ("deadline_exceeded", "trunk_unavailable")
            assert client.models.list().data
    finally:
        api.process.kill()
        api.process.communicate()
