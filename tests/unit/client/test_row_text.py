"""Text that comes token by token is the text of the whole reply, and nothing is taken back."""

import random
import time
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from cutlayer.client.row_text import RowText
from tests.tiny_models import save_tokenizer

TEXTS = (
    "plain words, 1,234 numbers. And then some more.",
    "naïve café — “quotes” … 日本語 and 한국어, Ελληνικά",
    "emoji 😀👩‍👩‍👧‍👦 flags 🇩🇪 end",
    "line\n\n  indented\tand tabs \n",
    "",
)


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(folder)
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def sentence_piece() -> Any:
    """Words that carry their space in front, and bytes for all else, as Llama 2 has them."""
    words = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    words += ["\u2581plain", "\u2581words", "\u2581and", "and", "\u2581"]
    vocabulary = {word: index for index, word in enumerate(words)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("\u2581", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(content=" ", left=1, right=0),
        ]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def _pieces(tokenizer: Any, tokens: list[int], *stop: str) -> list[str]:
    text = RowText(tokenizer, stop)
    pieces = [text.add(token) for token in tokens]
    return [*pieces, text.rest()]


@pytest.mark.parametrize("text", TEXTS)
def test_pieces_join_to_the_whole(byte_level: Any, text: str) -> None:
    tokens = byte_level(text)["input_ids"]
    assert "".join(_pieces(byte_level, tokens)) == text


def test_no_piece_is_half_a_character(byte_level: Any) -> None:
    tokens = byte_level("a😀é")["input_ids"]
    assert _pieces(byte_level, tokens) == ["a", "", "", "", "😀", "", "é", ""]


def test_spaces_and_bytes_of_sentence_piece_are_those_of_the_whole(sentence_piece: Any) -> None:
    ids = sentence_piece.convert_tokens_to_ids
    emoji = [f"<0x{byte:02X}>" for byte in "😀é".encode()]
    names = ["\u2581plain", "\u2581words", "</s>", "\u2581and", "and", *emoji, "\u2581plain"]
    tokens = ids(names)
    whole = sentence_piece.decode(tokens, skip_special_tokens=True)
    assert whole == "plain words andand😀é plain"
    assert "".join(_pieces(sentence_piece, tokens)) == whole


@pytest.mark.parametrize("seed", range(20))
def test_random_bytes_end_as_the_whole_text_does(byte_level: Any, seed: int) -> None:
    draw = random.Random(seed)
    tokens = [draw.choice([*range(60, 110), *range(230)]) for _ in range(120)]
    tokens = [token for token in tokens if token < 256]
    whole = byte_level.decode(tokens, skip_special_tokens=True)
    assert "".join(_pieces(byte_level, tokens)) == whole


def test_bytes_that_never_become_text_are_let_go(byte_level: Any) -> None:
    garbage = [byte_level(chr(0x80))["input_ids"][-1]] * 500
    text = RowText(byte_level, ())
    assert sum(len(text.add(token)) for token in garbage) > 400


def test_a_stop_text_over_several_tokens_ends_the_reply_before_it(byte_level: Any) -> None:
    text = RowText(byte_level, ["END", "\n\n"])
    shown = [text.add(token) for token in byte_level("so ENtrust the END now")["input_ids"]]
    assert "".join(shown) == "so ENtrust the "
    assert text.is_stopped
    assert text.rest() == ""
    assert text.num_chars == len("so ENtrust the ")


def test_the_earliest_of_several_stop_texts_counts(byte_level: Any) -> None:
    assert "".join(_pieces(byte_level, byte_level("a, b; c")["input_ids"], "; ", ", ")) == "a"


def test_the_beginning_of_a_stop_text_is_shown_when_no_more_comes(byte_level: Any) -> None:
    pieces = _pieces(byte_level, byte_level("the EN")["input_ids"], "END")
    assert "".join(pieces[:-1]) == "the "
    assert pieces[-1] == "EN"


def test_an_end_token_leaves_no_text(byte_level: Any) -> None:
    end = byte_level.eos_token_id
    assert "".join(_pieces(byte_level, [*byte_level("ab")["input_ids"], end])) == "ab"


def test_a_token_costs_the_same_at_the_end_of_a_long_reply(byte_level: Any) -> None:
    tokens = byte_level("some words of a long reply. " * 300)["input_ids"]
    text = RowText(byte_level, ["never met"])

    def seconds(part: list[int]) -> float:
        began_s = time.process_time()
        for token in part:
            text.add(token)
        return time.process_time() - began_s

    first = seconds(tokens[:2000])
    seconds(tokens[2000:-2000])
    assert seconds(tokens[-2000:]) < 3 * first
