"""The official client works unmodified, and gets what the plain model says."""

import concurrent.futures
from itertools import pairwise

import openai
import pytest
import torch

from tests.unit.api.conftest import MODEL, Serve, World

HELLO = [{"role": "user", "content": "hello there"}]


def _greedy(world: World, prompt: list[int], num_new: int) -> list[int]:
    tokens, ends = list(prompt), {256}
    with torch.no_grad():
        for _ in range(num_new):
            tokens.append(int(world.plain(torch.tensor([tokens])).logits[0, -1].argmax()))
            if tokens[-1] in ends:
                return tokens[len(prompt) : -1]
    return tokens[len(prompt) :]


def _chat_prompt(world: World) -> list[int]:
    text = world.model.tokenizer.apply_chat_template(
        HELLO, tokenize=False, add_generation_prompt=True
    )
    return list(world.model.tokenizer(text, add_special_tokens=False)["input_ids"])


def test_the_model_is_listed_and_found(world: World) -> None:
    client = world.client()
    assert [model.id for model in client.models.list()] == [MODEL]
    found = client.models.retrieve(MODEL)
    assert (found.id, found.object, found.owned_by) == (MODEL, "model", "cutlayer")
    with pytest.raises(openai.NotFoundError) as error:
        client.models.retrieve("other/model")
    assert error.value.code == "model_not_found"


def test_a_chat_reply_is_the_plain_models(world: World) -> None:
    prompt = _chat_prompt(world)
    made = world.client().chat.completions.create(
        model=MODEL, messages=HELLO, max_tokens=9, temperature=0
    )
    tokens = _greedy(world, prompt, 9)
    choice = made.choices[0]
    assert choice.message.content == world.model.tokenizer.decode(tokens, skip_special_tokens=True)
    assert choice.finish_reason == ("length" if len(tokens) == 9 else "stop")
    assert made.object == "chat.completion"
    assert made.usage is not None
    assert made.usage.prompt_tokens == len(prompt)
    assert made.usage.completion_tokens == len(tokens)
    assert made.usage.total_tokens == len(prompt) + len(tokens)
    assert made.usage.prompt_tokens_details.cached_tokens == 0


def test_a_stream_joins_to_the_same_reply(world: World) -> None:
    client = world.client()
    asked = {"model": MODEL, "messages": HELLO, "max_tokens": 12, "temperature": 0}
    whole = client.chat.completions.create(**asked)
    options = {"include_usage": True}
    chunks = list(client.chat.completions.create(**asked, stream=True, stream_options=options))
    assert chunks[0].choices[0].delta.role == "assistant"
    deltas = [chunk.choices[0] for chunk in chunks if chunk.choices]
    text = "".join(choice.delta.content or "" for choice in deltas)
    assert text == whole.choices[0].message.content
    assert deltas[-1].finish_reason == whole.choices[0].finish_reason
    assert all(choice.finish_reason is None for choice in deltas[:-1])
    assert chunks[-1].choices == []
    assert chunks[-1].usage == whole.usage
    assert all(chunk.usage is None for chunk in chunks[:-1])
    assert len({chunk.id for chunk in chunks}) == 1


def test_a_completion_takes_text_texts_ids_and_rows_of_ids(world: World) -> None:
    client = world.client()
    ids = [list(world.model.tokenizer(text)["input_ids"]) for text in ("abc", "xyzw")]
    asked = {"model": MODEL, "max_tokens": 6, "temperature": 0}
    text = client.completions.create(prompt="abc", **asked)
    rows = client.completions.create(prompt=ids, **asked)
    assert text.choices[0].text == world.model.tokenizer.decode(_greedy(world, ids[0], 6))
    assert client.completions.create(prompt=ids[0], **asked).choices == text.choices
    assert client.completions.create(prompt=["abc", "xyzw"], **asked).choices == rows.choices
    assert [choice.index for choice in rows.choices] == [0, 1]
    assert rows.choices[0].text == text.choices[0].text
    assert rows.usage is not None
    assert rows.usage.prompt_tokens == 7


def test_echo_puts_the_prompt_before_the_reply(world: World) -> None:
    client = world.client()
    asked = {"model": MODEL, "max_tokens": 4, "temperature": 0, "prompt": ["ab", "cd"]}
    plain = client.completions.create(**asked)
    echoed = client.completions.create(**asked, echo=True)
    for prompt, choice, other in zip(("ab", "cd"), plain.choices, echoed.choices, strict=True):
        assert other.text == prompt + choice.text
    streamed = client.completions.create(**asked | {"prompt": "ab"}, echo=True, stream=True)
    assert "".join(chunk.choices[0].text for chunk in streamed) == echoed.choices[0].text


def test_log_probabilities_of_a_chat_are_the_plain_models(world: World) -> None:
    made = world.client().chat.completions.create(
        model=MODEL, messages=HELLO, max_tokens=5, temperature=0, logprobs=True, top_logprobs=3
    )
    prompt = _chat_prompt(world)
    tokens = _greedy(world, prompt, 5)
    with torch.no_grad():
        logits_NV = world.plain(torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 :]
    logprobs_NV = torch.log_softmax(logits_NV, -1)
    assert made.choices[0].logprobs is not None
    scored = made.choices[0].logprobs.content
    assert scored is not None
    assert len(scored) == len(tokens)
    for place, (token, entry) in enumerate(zip(tokens, scored, strict=True)):
        assert entry.logprob == pytest.approx(float(logprobs_NV[place, token]), abs=1e-4)
        best = torch.topk(logprobs_NV[place], 3).values.tolist()
        assert [top.logprob for top in entry.top_logprobs] == pytest.approx(best, abs=1e-4)
    assert b"".join(bytes(entry.bytes or []) for entry in scored) == bytes(
        b for t in tokens for b in _bytes_of(world, t)
    )


def _bytes_of(world: World, token: int) -> bytes:
    name = world.model.tokenizer.convert_ids_to_tokens(token)
    if token >= 256:
        return str(name).encode()
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in printable]
    code = ord(name)
    return bytes([hidden[code - 256] if code >= 256 else code])


def test_log_probabilities_of_a_completion_have_that_apis_older_shape(world: World) -> None:
    made = world.client().completions.create(
        model=MODEL, prompt="abc", max_tokens=5, temperature=0, logprobs=2
    )
    scored = made.choices[0].logprobs
    assert scored is not None
    assert scored.tokens is not None
    assert scored.top_logprobs is not None
    assert len(scored.tokens) == len(scored.token_logprobs or []) == 5
    for token, logprob, top in zip(
        scored.tokens, scored.token_logprobs or [], scored.top_logprobs, strict=True
    ):
        assert top[token] == logprob == max(top.values())
        assert len(top) == 2
    assert scored.text_offset is not None
    assert all(before <= after for before, after in pairwise(scored.text_offset))


def test_streamed_log_probabilities_are_those_of_the_whole(world: World) -> None:
    client = world.client()
    asked = {"model": MODEL, "messages": HELLO, "max_tokens": 8, "temperature": 0}
    asked |= {"logprobs": True, "top_logprobs": 1}
    whole = client.chat.completions.create(**asked).choices[0].logprobs
    pieces = [
        entry
        for chunk in client.chat.completions.create(**asked, stream=True)
        for choice in chunk.choices
        if choice.logprobs is not None
        for entry in choice.logprobs.content or []
    ]
    assert whole is not None
    assert pieces == whole.content


def test_several_replies_are_drawn_apart_and_a_seed_repeats_them(world: World) -> None:
    client = world.client()

    def replies(seed: int | None) -> list[str]:
        made = client.completions.create(
            model=MODEL, prompt="abc", n=3, max_tokens=8, temperature=1.5, seed=seed
        )
        assert [choice.index for choice in made.choices] == [0, 1, 2]
        assert made.usage is not None
        assert made.usage.prompt_tokens == 3
        return [choice.text for choice in made.choices]

    first = replies(7)
    assert len(set(first)) == 3
    assert replies(7) == first
    assert replies(8) != first
    assert replies(None) != replies(None)
    assert len(replies(-1)) == 3


def test_a_stop_text_ends_the_reply_and_is_not_part_of_it(world: World) -> None:
    client = world.client()
    asked = {"model": MODEL, "prompt": "abc", "max_tokens": 12, "temperature": 0}
    whole = client.completions.create(**asked).choices[0].text
    stop = whole[4:6]
    for given in (stop, [stop, "never"]):
        made = client.completions.create(**asked, stop=given, logprobs=0)
        assert made.choices[0].text == whole[: whole.index(stop)]
        assert made.choices[0].finish_reason == "stop"
        scored = made.choices[0].logprobs
        assert scored is not None
        assert all(offset < whole.index(stop) for offset in scored.text_offset or [])
    streamed = client.completions.create(**asked, stop=stop, stream=True)
    assert "".join(chunk.choices[0].text for chunk in streamed) == whole[: whole.index(stop)]


def test_requests_at_once_share_the_engine_and_none_sees_anothers_tokens(serve: Serve) -> None:
    world = serve(token_s=0.005)
    client = world.client()

    def ask(letter: str) -> str:
        made = client.completions.create(
            model=MODEL, prompt=letter * 3, max_tokens=10, temperature=0, stream=True
        )
        return "".join(chunk.choices[0].text for chunk in made)

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        replies = list(pool.map(ask, "abcdefgh"))
    assert world.engine.most_streams > 1
    decode = world.model.tokenizer.decode
    for letter, reply in zip("abcdefgh", replies, strict=True):
        ids = list(world.model.tokenizer(letter * 3)["input_ids"])
        assert reply == decode(_greedy(world, ids, 10), skip_special_tokens=True)


def test_the_async_client_works_too(world: World) -> None:
    import asyncio

    async def ask() -> str:
        url = f"{world.api.url}/v1"
        async with openai.AsyncOpenAI(base_url=url, api_key="x", max_retries=0) as client:
            stream = await client.chat.completions.create(
                model=MODEL, messages=HELLO, max_tokens=4, temperature=0, stream=True
            )
            return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

    whole = world.client().chat.completions.create(
        model=MODEL, messages=HELLO, max_tokens=4, temperature=0
    )
    assert asyncio.run(ask()) == whole.choices[0].message.content


def test_parts_of_type_text_and_the_developers_role_are_text(world: World) -> None:
    client = world.client()
    asked = {"model": MODEL, "max_completion_tokens": 5, "temperature": 0}
    parts = [{"type": "text", "text": "hello "}, {"type": "text", "text": "there"}]
    turns = [{"role": "developer", "content": "be"}, {"role": "user", "content": parts}]
    plain = [{"role": "system", "content": "be"}, {"role": "user", "content": "hello there"}]
    made = client.chat.completions.create(messages=turns, **asked)
    assert made.choices == client.chat.completions.create(messages=plain, **asked).choices
