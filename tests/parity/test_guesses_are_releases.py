"""What guesses add to the ledger of a whole split: the rejected ones, and nothing else."""

from pathlib import Path

from cutlayer import Client
from cutlayer.client.generate import Generator
from cutlayer.client.settings import DraftKind, SamplingSettings
from cutlayer.client.streams import Request, Stream
from tests.tiny_models import tiny_llama_folder
from tests.worlds import client_of, client_settings, running_server, server_settings

PROMPT = [65, 66, 67, 65, 66, 67, 65]
OTHER = [90, 91, 92, 90, 91]
NEW_TOKENS = 40
NOISE = {"privacy__mechanism": "gaussian", "privacy__scale": 0.02}


def replies(
    folder: Path, model: Path, kind: DraftKind, sampling: SamplingSettings, **changes: object
) -> tuple[list[Stream], int]:
    """Two streams together, and the vectors that they released."""
    folder.mkdir()
    speculation = {"kind": str(kind), "model": str(model)}
    settings = client_settings(model, folder, generation__speculation=speculation, **changes)
    with (
        running_server(server_settings(model, folder)) as server,
        client_of(server, settings) as client,
    ):
        streams = _decoded(client, sampling)
        return streams, client.ledger.num_vectors.get("generation", 0)


def _decoded(client: Client, sampling: SamplingSettings) -> list[Stream]:
    generator: Generator = client.generator()
    decoder = generator.decoder(generator.session())
    try:
        streams = [
            decoder.add(Request(prompt=prompt, sampling=sampling, draw=draw))
            for draw, prompt in enumerate((PROMPT, OTHER))
        ]
        decoder.finish(streams)
    finally:
        decoder.close()
    return streams


def test_every_guess_is_a_release_and_an_accepted_one_is_released_once(tmp_path: Path) -> None:
    model = tiny_llama_folder(tmp_path)
    sampling = SamplingSettings(max_new_tokens=NEW_TOKENS)
    _, plain_vectors = replies(tmp_path / "plain", model, DraftKind.NONE, sampling, **NOISE)
    streams, vectors = replies(tmp_path / "guessed", model, DraftKind.LOOKUP, sampling, **NOISE)
    num_rejected = sum(stream.num_drafted - stream.num_accepted for stream in streams)
    assert plain_vectors == len(PROMPT) + len(OTHER) + 2 * (NEW_TOKENS - 1)
    assert sum(stream.num_drafted for stream in streams) > 0
    assert vectors == plain_vectors + num_rejected
