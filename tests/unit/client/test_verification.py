"""Verification changes nothing: greedy, seeded and statistical equality with plain decoding."""

from collections.abc import Callable, Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cutlayer.client.draft_protocol import Draft
from cutlayer.client.sampling import RowSampler, next_tokens
from cutlayer.client.settings import SamplingSettings
from cutlayer.client.verification import verify

VOCAB = 7
DRAWS = 4000
LEAST_P_VALUE = 1e-3

Rule = Callable[[Tensor, Draft, RowSampler, Sequence[int]], list[int]]

SAMPLINGS = [
    SamplingSettings(temperature=1.0),
    SamplingSettings(temperature=0.7, top_p=0.8),
    SamplingSettings(temperature=1.3, top_k=4, repetition_penalty=1.4),
    SamplingSettings(temperature=1.0, min_p=0.2),
]


def model(text: Sequence[int]) -> Tensor:
    """Logits [V] that depend on the whole text."""
    seed = hash(tuple(text)) % 2**31
    return torch.randn(VOCAB, generator=torch.Generator().manual_seed(seed)) * 1.5


def small_model(text: Sequence[int]) -> Tensor:
    return model(text) * 0.5 + torch.randn(
        VOCAB, generator=torch.Generator().manual_seed(len(text))
    )


def logits_after(text: Sequence[int], draft: Draft) -> Tensor:
    places = range(len(draft.tokens) + 1)
    return torch.stack([model([*text, *draft.tokens[:place]]) for place in places])


def plain(prompt: Sequence[int], sampler: RowSampler, num_tokens: int) -> list[int]:
    text = list(prompt)
    while len(text) < len(prompt) + num_tokens:
        text.append(sampler.next_token(model(text), text))
    return text[len(prompt) :]


def speculative(
    prompt: Sequence[int],
    sampler: RowSampler,
    num_tokens: int,
    propose: Callable[[list[int]], Draft],
    rule: Rule = verify,
) -> list[int]:
    text = list(prompt)
    while len(text) < len(prompt) + num_tokens:
        draft = propose(text)
        text += rule(logits_after(text, draft), draft, sampler, text)
    return text[len(prompt) : len(prompt) + num_tokens]


def p_value(counts: Tensor, expected: Tensor) -> float:
    """Of Pearson's chi-square test; outcomes that are expected less than 5 times are pooled."""
    is_rare = expected < 5
    counts, expected = (
        torch.cat([values[~is_rare], values[is_rare].sum()[None]]) for values in (counts, expected)
    )
    counts, expected = counts[expected > 0], expected[expected > 0]
    statistic = ((counts - expected) ** 2 / expected).sum()
    freedom = torch.tensor(float(len(counts) - 1))
    return float(torch.special.gammaincc(freedom / 2, statistic.double() / 2))


def pair_probabilities(prompt: list[int], sampling: SamplingSettings) -> Tensor:
    """Probabilities [V * V] of the next two tokens under plain sampling, computed."""
    sampler = RowSampler(sampling, 0)
    first_V = sampler.probabilities(model(prompt), prompt).double()
    texts = [[*prompt, token] for token in range(VOCAB)]
    rest_VV = torch.stack([sampler.probabilities(model(text), text).double() for text in texts])
    return (first_V[:, None] * rest_VV).reshape(-1)


def drawn_draft(sampling: SamplingSettings) -> Callable[[list[int]], Draft]:
    drafts = RowSampler(sampling, -1)

    def propose(text: list[int]) -> Draft:
        seen, rows = list(text), []
        for _ in range(2):
            rows.append(drafts.probabilities(small_model(seen), seen))
            seen.append(drafts.draw(rows[-1]))
        return Draft(tuple(seen[len(text) :]), torch.stack(rows))

    return propose


def fixed_draft(text: list[int]) -> Draft:
    return Draft((3, 5))


def likeliest_draft(text: list[int]) -> Draft:
    first = int(model(text).argmax())
    return Draft((first, int(model([*text, first]).argmax())))


def p_value_of(
    sampling: SamplingSettings, propose: Callable[[list[int]], Draft], rule: Rule = verify
) -> float:
    """How well the next two tokens of many replies fit plain sampling."""
    prompt, sampler = [1, 2, 3], RowSampler(sampling, 0)
    counts = torch.zeros(VOCAB * VOCAB, dtype=torch.float64)
    for _ in range(DRAWS):
        first, second = speculative(prompt, sampler, 2, propose, rule)
        counts[first * VOCAB + second] += 1
    return p_value(counts, pair_probabilities(prompt, sampling) * DRAWS)


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=range(len(SAMPLINGS)))
@pytest.mark.parametrize("kind", ["fixed", "likeliest", "drawn"])
def test_outcomes_are_distributed_as_plain_sampling(sampling: SamplingSettings, kind: str) -> None:
    propose = {"fixed": fixed_draft, "likeliest": likeliest_draft, "drawn": drawn_draft(sampling)}
    assert p_value_of(sampling, propose[kind]) > LEAST_P_VALUE


def accept_all(
    logits_KV: Tensor, draft: Draft, sampler: RowSampler, seen: Sequence[int]
) -> list[int]:
    return [*draft.tokens, sampler.next_token(logits_KV[-1], [*seen, *draft.tokens])]


def redraw_from_the_whole(
    logits_KV: Tensor, draft: Draft, sampler: RowSampler, seen: Sequence[int]
) -> list[int]:
    """The usual mistake: after a rejection p itself instead of what is left of it."""
    assert draft.probabilities_KV is not None
    text = list(seen)
    for logits_V, token, q_V in zip(logits_KV, draft.tokens, draft.probabilities_KV, strict=False):
        p_V = sampler.probabilities(logits_V, text)
        if not sampler.accepts(float(p_V[token]), float(q_V[token])):
            return [*text[len(seen) :], sampler.draw(p_V)]
        text.append(token)
    return [*text[len(seen) :], sampler.next_token(logits_KV[-1], text)]


@pytest.mark.parametrize("rule", [accept_all, redraw_from_the_whole])
def test_wrong_rules_fail_the_same_test(rule: Rule) -> None:
    sampling = SAMPLINGS[0]
    assert p_value_of(sampling, drawn_draft(sampling), rule) < LEAST_P_VALUE


def test_a_drawn_draft_taken_for_a_fixed_one_still_samples_right() -> None:
    """Equality with the model's own draw is exact for any draft, however it came about."""
    sampling = SAMPLINGS[0]
    propose = drawn_draft(sampling)
    assert p_value_of(sampling, lambda text: Draft(propose(text).tokens)) > LEAST_P_VALUE


@settings(max_examples=60, deadline=None)
@given(
    prompt=st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=4),
    drafts=st.lists(st.lists(st.integers(0, VOCAB - 1), max_size=4), min_size=1, max_size=8),
    temperature=st.sampled_from([0.0, 1.0]),
    penalty=st.sampled_from([1.0, 1.5]),
)
def test_undrawn_drafts_give_the_very_tokens_of_plain_decoding(
    prompt: list[int], drafts: list[list[int]], temperature: float, penalty: float
) -> None:
    sampling = SamplingSettings(temperature=temperature, repetition_penalty=penalty, seed=3)
    waiting = iter(drafts * 20)

    def propose(text: list[int]) -> Draft:
        # Half of the drafts begin with the right token, so that some are accepted.
        guesses = next(waiting)
        right = [int(model(text).argmax())] if len(guesses) % 2 else []
        return Draft((*right, *guesses))

    expected = plain(prompt, RowSampler(sampling, 0), 12)
    assert speculative(prompt, RowSampler(sampling, 0), 12, propose) == expected


def test_greedy_streams_accept_drawn_drafts_by_equality() -> None:
    sampling = SamplingSettings()
    prompt = [4, 4]
    expected = plain(prompt, RowSampler(sampling, 0), 12)
    propose = drawn_draft(SamplingSettings(temperature=1.0))
    assert speculative(prompt, RowSampler(sampling, 0), 12, propose) == expected


def test_equal_distributions_accept_every_draft() -> None:
    sampling = SamplingSettings(temperature=1.0)
    sampler, drafts = RowSampler(sampling, 0), RowSampler(sampling, 1)
    for _ in range(200):
        p_V = drafts.probabilities(model([1]), [1])
        draft = Draft((drafts.draw(p_V),), p_V[None])
        assert len(verify(logits_after([1], draft), draft, sampler, [1])) == 2


def test_a_draft_of_no_tokens_is_plain_decoding() -> None:
    sampler, again = (RowSampler(SamplingSettings(temperature=1.0), 0) for _ in range(2))
    empty = torch.zeros(0, VOCAB)
    for draft in (Draft(()), Draft((), empty)):
        assert verify(model([5])[None], draft, sampler, [5]) == [again.next_token(model([5]), [5])]


def test_ties_go_to_the_first_token_in_every_path() -> None:
    logits_BV = torch.zeros(9, 50_000)
    logits_BV[:, [40_001, 17_000, 49_999]] = 1.0
    sampler = RowSampler(SamplingSettings(), 0)
    assert sampler.next_token(logits_BV[0], []) == 17_000
    assert next_tokens([sampler] * 9, logits_BV, [[]] * 9) == [17_000] * 9
    assert verify(logits_BV, Draft((17_000,) * 8), sampler, []) == [17_000] * 9
