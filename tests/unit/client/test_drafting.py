"""Drafters: lookup against a search of the whole text, self and model against plain decoding."""

import random
import time
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cutlayer.client.draft_lookup import LookupDrafter
from cutlayer.client.draft_model import ModelDrafter
from cutlayer.client.drafting import DRAFTERS, DraftWorld, make_drafter
from cutlayer.client.sampling import RowSampler
from cutlayer.client.settings import DraftKind, SamplingSettings, SpeculationSettings
from cutlayer.errors import ConfigError

VOCAB = 9
GREEDY = SamplingSettings()


def searched(text: Sequence[int], min_match: int, num_tokens: int) -> list[int]:
    """The latest of the longest matches of the text's end, found by reading all of it."""
    best, best_length = None, min_match - 1
    for end in range(len(text) - 1, 0, -1):
        length = 0
        while length < end and text[end - 1 - length] == text[len(text) - 1 - length]:
            length += 1
        if length > best_length:
            best, best_length = end, length
    if best is None:
        return []
    guessed = list(text)
    for offset in range(num_tokens):
        guessed.append(guessed[best + offset])
    return guessed[len(text) :]


@settings(max_examples=200, deadline=None)
@given(
    text=st.lists(st.integers(0, 2), min_size=1, max_size=30),
    min_match=st.integers(1, 6),
    num_tokens=st.integers(0, 9),
)
def test_lookup_finds_the_latest_of_the_longest_matches(
    text: list[int], min_match: int, num_tokens: int
) -> None:
    drafter = LookupDrafter(min_match)
    for length in range(1, len(text) + 1):
        draft = drafter.propose(text[:length], num_tokens)
        assert list(draft.tokens) == searched(text[:length], min_match, num_tokens)
        assert draft.probabilities_KV is None


def test_lookup_goes_on_with_its_own_copy_where_the_text_ends() -> None:
    drafter = LookupDrafter(min_match=2)
    assert drafter.propose([7, 1, 2, 3, 1, 2, 3, 1, 2], 7).tokens == (3, 1, 2, 3, 1, 2, 3)


def test_lookup_starts_anew_with_another_text() -> None:
    drafter = LookupDrafter(min_match=1)
    assert drafter.propose([1, 2, 3, 1], 2).tokens == (2, 3)
    drafter.close()
    assert drafter.propose([3, 1], 2).tokens == ()


@pytest.mark.parametrize("kind", ["words", "one token", "period"])
def test_lookup_takes_less_than_50_us_a_token_at_4096_tokens(kind: str) -> None:
    draws = random.Random(1)
    text = {
        "words": [int(draws.paretovariate(0.6)) % 5000 for _ in range(4096)],
        "one token": [5] * 4096,
        "period": [place % 37 for place in range(4096)],
    }[kind]
    drafter = LookupDrafter(min_match=2)
    drafter.propose(text[:3072], 8)
    start_s = time.process_time()
    for length in range(3073, 4097):
        drafter.propose(_Prefix(text, length), 8)
    assert (time.process_time() - start_s) / 1024 < 50e-6


class _Prefix(Sequence[int]):
    """The beginning of a text without a copy; reading more than its end would be slow."""

    def __init__(self, text: list[int], length: int) -> None:
        self._text, self._length = text, length

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, place: int) -> int:  # type: ignore[override]
        return self._text[place]


class Parrot:
    """A model whose next token depends on the last two; it counts what it is fed."""

    context_length = 600

    def __init__(self, sharpness: float = 9.0) -> None:
        self.fed: list[int] = []
        self.num_fed = 0
        self._sharpness = sharpness

    def extend(self, tokens: Sequence[int]) -> Tensor:
        assert tokens
        self.fed += tokens
        self.num_fed += len(tokens)
        return logits_after(self.fed, self._sharpness)

    def truncate(self, length: int) -> None:
        assert length <= len(self.fed)
        del self.fed[length:]

    @property
    def length(self) -> int:
        return len(self.fed)


def logits_after(text: Sequence[int], sharpness: float = 9.0) -> Tensor:
    logits_V = torch.zeros(VOCAB)
    logits_V[(text[-1] * 3 + sum(text[-2:-1]) + 1) % VOCAB] = sharpness
    return logits_V


def greedy(text: Sequence[int], num_tokens: int) -> list[int]:
    grown = list(text)
    for _ in range(num_tokens):
        grown.append(int(logits_after(grown).argmax()))
    return grown[len(text) :]


def test_a_model_drafts_what_it_would_say_itself() -> None:
    model = Parrot()
    draft = ModelDrafter(model, GREEDY, draw=0, least_confidence=0.3).propose([1, 2, 3], 5)
    assert list(draft.tokens) == greedy([1, 2, 3], 5)
    assert draft.probabilities_KV is None
    assert model.length == 3 + 5 - 1


def test_a_model_is_fed_each_token_once_unless_a_guess_was_wrong() -> None:
    model = Parrot()
    drafter, text = ModelDrafter(model, GREEDY, draw=0, least_confidence=0.3), [1, 2, 3]
    draft = drafter.propose(text, 4)
    text += [*draft.tokens[:2], 8]
    assert list(drafter.propose(text, 3).tokens) == greedy(text, 3)
    assert model.fed[: len(text)] == text
    # Three of the prompt and three guesses; then the one that corrects, and two guesses.
    assert model.num_fed == 6 + 1 + 2


def test_a_model_reads_a_long_prompt_in_pieces_before_it_guesses() -> None:
    model = Parrot()
    drafter, text = ModelDrafter(model, GREEDY, draw=0, least_confidence=0.3), [1, 2] * 260
    calls = [drafter.propose(text, 2) for _ in range(3)]
    assert [len(draft.tokens) for draft in calls] == [0, 0, 2]
    assert model.fed[: len(text)] == text


def test_a_model_guesses_nothing_beyond_its_context() -> None:
    model = Parrot()
    model.context_length = 10
    drafter = ModelDrafter(model, GREEDY, draw=0, least_confidence=0.3)
    assert len(drafter.propose([1] * 8, 5).tokens) == 2
    assert drafter.propose([1] * 11, 5).tokens == ()


def test_a_sampling_stream_gets_the_distributions_that_its_guesses_were_drawn_from() -> None:
    sampling = SamplingSettings(temperature=1.0, top_k=3, seed=2)
    text = [1, 2, 3]
    draft = ModelDrafter(Parrot(4.0), sampling, draw=1, least_confidence=0.3).propose(text, 4)
    assert draft.probabilities_KV is not None
    for place, token in enumerate(draft.tokens):
        seen = [*text, *draft.tokens[:place]]
        p_V = RowSampler(sampling, 0).probabilities(logits_after(seen, 4.0), seen)
        assert torch.equal(draft.probabilities_KV[place], p_V)
        assert float(p_V[token]) > 0


def test_doubtful_guesses_are_not_made() -> None:
    model = Parrot(sharpness=0.5)
    assert ModelDrafter(model, GREEDY, draw=0, least_confidence=0.3).propose([1, 2], 4).tokens == ()


class Parts:
    """Stands for head, adapter and tail with the row's caches."""

    def __init__(self, text: list[int]) -> None:
        self.text = text
        self.guessed: list[int] = []

    def guess(self, token: int) -> Tensor:
        self.guessed.append(token)
        return logits_after([*self.text[:-1], *self.guessed])

    def forget(self) -> None:
        self.guessed.clear()


def self_drafter(parts: Parts, sampling: SamplingSettings = GREEDY) -> DraftWorld:
    return DraftWorld(sampling=sampling, guess=parts.guess, forget=parts.forget)


def test_own_parts_draft_greedily_and_leave_nothing_behind() -> None:
    text = [1, 2, 3]
    parts = Parts(text)
    drafter = make_drafter(SpeculationSettings(kind=DraftKind.SELF), self_drafter(parts))
    draft = drafter.propose(text, 5)
    assert list(draft.tokens) == greedy(text, 5)
    assert draft.probabilities_KV is None
    assert parts.guessed == []


def test_own_parts_forget_their_guesses_when_one_fails() -> None:
    parts = Parts([1])

    def fail(token: int) -> Tensor:
        parts.guess(token)
        raise ConfigError("the row is full")

    world = DraftWorld(sampling=GREEDY, guess=fail, forget=parts.forget)
    drafter = make_drafter(SpeculationSettings(kind=DraftKind.SELF), world)
    with pytest.raises(ConfigError, match="full"):
        drafter.propose([1], 3)
    assert parts.guessed == []


@pytest.mark.parametrize("kind", list(DraftKind))
def test_every_kind_can_be_made_and_closed(kind: DraftKind) -> None:
    text = [1, 2, 1, 2]
    parts = Parts(text)
    world = DraftWorld(sampling=GREEDY, guess=parts.guess, forget=parts.forget, model=Parrot)
    drafter = make_drafter(SpeculationSettings(kind=kind), world)
    assert len(drafter.propose(text, 3).tokens) == (0 if kind is DraftKind.NONE else 3)
    drafter.close()
    assert set(DRAFTERS) == set(DraftKind)


@pytest.mark.parametrize("kind", [DraftKind.SELF, DraftKind.MODEL])
def test_a_kind_without_what_it_needs_says_so(kind: DraftKind) -> None:
    with pytest.raises(ConfigError, match=r"generation\.speculation"):
        make_drafter(SpeculationSettings(kind=kind), DraftWorld(sampling=GREEDY))
