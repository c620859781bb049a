"""A reply that nobody reads to its end."""

from pathlib import Path

from cutlayer.client.chat import Chat
from cutlayer.client.settings import SamplingSettings
from tests.tiny_models import save_tokenizer, tiny_llama_folder
from tests.worlds import client_of, client_settings, running_server, server_settings


def test_a_reply_that_was_left_releases_nothing_beside_the_next_one(tmp_path: Path) -> None:
    model = tiny_llama_folder(tmp_path)
    save_tokenizer(model)
    changes = {"generation__speculation": {"kind": "none"}, "generation__keep_rows": 0}
    with (
        running_server(server_settings(model, tmp_path)) as server,
        client_of(server, client_settings(model, tmp_path, **changes)) as client,
    ):
        generator = client.generator()
        tokenizer = client.tokenizer
        tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
        sampling = SamplingSettings(max_new_tokens=12)
        chat = Chat(generator.decoder(generator.session()), tokenizer, sampling, 100)
        left = chat.ask("abcdef")
        next(left)
        left.close()
        before = client.ledger.num_vectors["generation"]
        list(chat.ask("xyz"))
        released = client.ledger.num_vectors["generation"] - before
        chat.close()
    assert released <= len("xyz") + 2 + 12
