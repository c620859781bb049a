"""An endpoint over a tiny model that is not cut, and the official client beside it."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import openai
import pytest
from transformers import AutoTokenizer, PreTrainedModel

from cutlayer.api.engine import ServedModel
from cutlayer.api.serve import Api, start_api
from cutlayer.client.settings import SamplingSettings
from cutlayer.settings import parse_settings
from cutlayer.web.settings import ApiSettings
from tests.tiny_models import tiny_model
from tests.unit.api.plain_engine import PlainEngine

MODEL = "tiny-llama"


@dataclass
class World:
    """One endpoint at work."""

    api: Api
    engine: PlainEngine
    model: ServedModel
    plain: PreTrainedModel
    clients: list[openai.OpenAI] = field(default_factory=list)

    def client(self, key: str = "unused", retries: int = 0) -> openai.OpenAI:
        """The official client, unmodified."""
        url = f"{self.api.url}/v1"
        client = openai.OpenAI(base_url=url, api_key=key, max_retries=retries, timeout=30)
        self.clients.append(client)
        return client

    def end(self) -> None:
        """Close all of it."""
        for client in self.clients:
            client.close()
        self.api.stop()
        self.engine.close()


Serve = Callable[..., World]


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, PreTrainedModel]:
    return tiny_model("llama", tmp_path_factory.mktemp("model"))


@pytest.fixture
def serve(tiny: tuple[Path, PreTrainedModel], tmp_path: Path) -> Iterator[Serve]:
    """Start an endpoint with changed `[api]` settings; it ends with the test."""
    worlds: list[World] = []

    def start(token_s: float = 0.0, **changes: object) -> World:
        folder, plain = tiny
        table = {"address": "127.0.0.1:0", "drain_s": 1} | changes
        settings = parse_settings(ApiSettings, table, "test api")
        engine = PlainEngine(plain, token_s)
        model = ServedModel(
            name=MODEL,
            tokenizer=AutoTokenizer.from_pretrained(folder),
            context_length=128,
            sampling=SamplingSettings(max_new_tokens=12),
        )
        api = start_api(engine, model, settings, tmp_path)
        worlds.append(World(api, engine, model, plain))
        return worlds[-1]

    yield start
    for world in worlds:
        world.end()


@pytest.fixture
def world(serve: Serve) -> World:
    return serve()
