"""The soak run: its draws repeat, it finds a wrong token, and it closes what it opened."""

from collections.abc import Iterator

import pytest

from benchmarks.soak_conversations import ConversationSoak
from benchmarks.soak_memory import settled_bytes
from benchmarks.soak_plan import Script, SoakPrompt, make_prompts
from benchmarks.soak_sessions import SessionSoak, solo_replies
from cutlayer import Client, TrunkServer
from tests.tiny_models import tiny_llama_folder
from tests.worlds import client_of, client_settings, running_server, server_settings

_KINDS = pytest.mark.parametrize("kind", [SessionSoak, ConversationSoak])
_SECONDS = 2.5


@pytest.fixture(scope="module")
def prompts() -> list[SoakPrompt]:
    return make_prompts(seed=3, count=6, vocab_size=60, max_length=20)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TrunkServer]:
    folder = tmp_path_factory.mktemp("server")
    settings = server_settings(
        tiny_llama_folder(folder),
        folder,
        max_cache_bytes=200_000,
        max_client_cache_bytes=200_000,
        evict_after_s=0.05,
        session_ttl_s=0.4,
    )
    with running_server(settings) as running:
        yield running


@pytest.fixture(scope="module")
def client(server: TrunkServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    folder = tmp_path_factory.mktemp("client")
    with client_of(server, client_settings(tiny_llama_folder(folder), folder)) as opened:
        yield opened


@pytest.fixture(scope="module")
def expected(client: Client, prompts: list[SoakPrompt]) -> list[list[int]]:
    return solo_replies(client, prompts)


def _draws(script: Script) -> list[object]:
    return [
        draw
        for _ in range(50)
        for draw in (script.prompt(), script.act(), script.num_tokens(), script.idle_s())
    ]


def test_a_seed_gives_the_same_soak_again() -> None:
    assert _draws(Script(1, 9)) == _draws(Script(1, 9))
    assert _draws(Script(1, 9)) != _draws(Script(2, 9))
    assert make_prompts(1, 5, 60, 20) == make_prompts(1, 5, 60, 20)


def test_prompts_are_greedy_and_sampled_in_turn(prompts: list[SoakPrompt]) -> None:
    assert [prompt.temperature for prompt in prompts] == [0.0, 0.8] * 3
    assert all(4 <= len(prompt.tokens) <= 20 for prompt in prompts)


@_KINDS
def test_sessions_come_and_go_without_a_wrong_token(
    kind: type[SessionSoak | ConversationSoak],
    client: Client,
    prompts: list[SoakPrompt],
    expected: list[list[int]],
) -> None:
    soak = kind(client, prompts, expected, Script(5, len(prompts)), 12)
    soak.run(_SECONDS)
    tally = soak.tally
    assert tally.num_wrong == 0
    assert tally.num_finished > 0
    assert tally.num_cancelled > 0
    assert tally.num_resumed > 0


@_KINDS
def test_a_wrong_token_is_found(
    kind: type[SessionSoak | ConversationSoak],
    client: Client,
    prompts: list[SoakPrompt],
    expected: list[list[int]],
) -> None:
    others = [[*reply[:2], reply[2] + 1, *reply[3:]] for reply in expected]
    soak = kind(client, prompts, others, Script(5, len(prompts)), 6)
    soak.run(1.0)
    assert soak.tally.num_wrong > 0
    assert soak.tally.num_finished == 0


def test_sessions_that_idle_are_lost_and_replayed(
    client: Client, prompts: list[SoakPrompt], expected: list[list[int]]
) -> None:
    num_replays = 0
    for seed in range(6, 16):  # on a slow machine few sessions idle for long enough in one run
        soak = SessionSoak(client, prompts, expected, Script(seed, len(prompts)), 12)
        soak.run(_SECONDS)
        assert soak.tally.num_wrong == 0
        num_replays += soak.tally.num_replays
        if num_replays:
            break
    assert num_replays > 0


def test_memory_that_was_freed_is_not_counted() -> None:
    before = settled_bytes()
    held = bytearray(64 << 20)
    held[::4096] = b"x" * len(held[::4096])
    assert settled_bytes() > before + (48 << 20)
    del held
    assert settled_bytes() < before + (16 << 20)
