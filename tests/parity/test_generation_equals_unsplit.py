"""Split generation against the unsplit model's own cached greedy decoding."""

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from cutlayer.client.session import Feed
from cutlayer.client.settings import SamplingSettings
from tests.tiny_models import tiny_llama_folder
from tests.worlds import client_of, client_settings, loopback, running_server, server_settings

PROMPTS = ([65, 66, 67, 68, 69, 70, 71], [90, 91], [100, 101, 102, 103])
GREEDY = SamplingSettings(max_new_tokens=12)


def _unsplit(model: Path, prompt: list[int], num_new: int) -> list[int]:
    unsplit = AutoModelForCausalLM.from_pretrained(model).eval()
    with torch.no_grad():
        out = unsplit.generate(
            torch.tensor([prompt]),
            max_new_tokens=num_new,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
    return out[0, len(prompt) :].tolist()


def test_ragged_greedy_batch_equals_unsplit_token_for_token(tmp_path: Path) -> None:
    model = tiny_llama_folder(tmp_path)
    expected = [_unsplit(model, prompt, 12) for prompt in PROMPTS]
    with (
        running_server(server_settings(model, tmp_path)) as server,
        client_of(server, client_settings(model, tmp_path)) as client,
    ):
        assert client.generate_ids(PROMPTS, GREEDY) == expected


def test_one_round_trip_per_token(tmp_path: Path) -> None:
    model = tiny_llama_folder(tmp_path)
    with (
        running_server(server_settings(model, tmp_path)) as server,
        client_of(server, client_settings(model, tmp_path)) as client,
    ):
        client.trunk.hello()
        calls = []
        channel = client.trunk._link._channel
        assert channel is not None
        plain = channel.call
        channel.call = lambda frame, *rest: calls.append(frame.kind) or plain(frame, *rest)  # type: ignore[method-assign,func-returns-value]
        client.generate_ids([PROMPTS[0]], GREEDY)
    assert [kind.name for kind in calls] == ["OPEN_SESSION", *["DECODE"] * 12, "CLOSE_SESSION"]


def test_a_lost_session_is_replayed_and_the_text_goes_on(tmp_path: Path) -> None:
    model = tiny_llama_folder(tmp_path)
    noisy = {"privacy__mechanism": "gaussian", "privacy__scale": 0.02}
    with (
        running_server(server_settings(model, tmp_path)) as server,
        running_server(server_settings(model, tmp_path / "second")) as second,
        client_of(server, client_settings(model, tmp_path, **noisy)) as client,
    ):
        expected = client.generate_ids(PROMPTS, GREEDY)
        session = client.session([30, 30, 30])
        rows = [list(prompt) for prompt in PROMPTS]
        feed = [list(prompt) for prompt in PROMPTS]
        before = client.ledger
        for step in range(12):
            if step == 5:
                client.trunk._link._connect = lambda place: loopback(second)
                client.trunk._link._drop_channel()
            logits_BV = torch.cat(session.step([Feed(row=r, tokens=f) for r, f in enumerate(feed)]))
            feed = [[int(logits_V.argmax())] for logits_V in logits_BV]
            for row, new in zip(rows, feed, strict=True):
                row.extend(new)
        assert session.num_replays == 1
        assert client.ledger == before or client.ledger.num_lines == before.num_lines
    assert [row[len(p) :] for row, p in zip(rows, PROMPTS, strict=True)] == expected


def test_a_truncated_session_continues_as_if_the_rest_had_never_been(tmp_path: Path) -> None:
    model = tiny_llama_folder(tmp_path)
    with (
        running_server(server_settings(model, tmp_path)) as server,
        client_of(server, client_settings(model, tmp_path)) as client,
    ):
        session = client.session([40])
        session.step([Feed(row=0, tokens=PROMPTS[0])])
        (wanted,) = session.step([Feed(row=0, tokens=[5])])
        session.step([Feed(row=0, tokens=[6, 7, 8])])
        session.truncate(0, len(PROMPTS[0]))
        assert torch.equal(session.step([Feed(row=0, tokens=[5])])[0], wanted)
