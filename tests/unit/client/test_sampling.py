"""Sampling against transformers' own logits processors, and its own promises."""

import pytest
import torch
from transformers import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from cutlayer.client import sampling
from cutlayer.client.sampling import RowSampler, next_tokens
from cutlayer.client.settings import SamplingSettings

LOGITS = [torch.randn(50, generator=torch.Generator().manual_seed(seed)) * 3 for seed in range(8)]


@pytest.mark.parametrize("logits_V", LOGITS)
def test_filters_equal_those_of_transformers(logits_V: torch.Tensor) -> None:
    ids = torch.tensor([[3, 4, 4, 9]])
    cases = [
        (sampling._top_k(logits_V, 7), TopKLogitsWarper(7)),
        (sampling._top_p(logits_V, 0.8), TopPLogitsWarper(0.8)),
        (sampling._min_p(logits_V, 0.1), MinPLogitsWarper(0.1)),
        (sampling._penalised(logits_V, [3, 4, 4, 9], 1.7), RepetitionPenaltyLogitsProcessor(1.7)),
    ]
    for ours, theirs in cases:
        assert torch.equal(ours, theirs(ids, logits_V[None].clone())[0])


@pytest.mark.parametrize("p", [0.05, 0.5, 0.9, 0.999, 1.0])
@pytest.mark.parametrize("spread", [0.1, 2.0, 8.0])
def test_top_p_of_a_large_vocabulary_needs_no_full_sort(
    p: float, spread: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    logits_V = torch.randn(20_000, generator=torch.Generator().manual_seed(7)) * spread
    filtered_V = sampling._top_p(logits_V, p)
    monkeypatch.setattr(sampling, "_FEW", len(logits_V))
    assert torch.equal(filtered_V, sampling._top_p(logits_V, p))


def test_same_seed_gives_the_same_tokens_and_rows_draw_apart() -> None:
    settings = SamplingSettings(temperature=1.0, seed=5)

    def drawn(row: int) -> list[int]:
        sampler = RowSampler(settings, row)
        return [sampler.next_token(torch.zeros(1000), []) for _ in range(10)]

    assert drawn(0) == drawn(0)
    assert drawn(0) != drawn(1)


def test_draws_follow_the_probabilities() -> None:
    sampler = RowSampler(SamplingSettings(temperature=1.0), row=0)
    logits_V = torch.tensor([0.7, 0.2, 0.1]).log()
    counts = torch.bincount(torch.tensor([sampler.next_token(logits_V, []) for _ in range(4000)]))
    assert torch.allclose(counts / 4000, torch.tensor([0.7, 0.2, 0.1]), atol=0.04)


@pytest.mark.parametrize("logits_V", LOGITS)
def test_the_next_token_is_drawn_from_the_probabilities_shown(logits_V: torch.Tensor) -> None:
    for settings in (
        SamplingSettings(temperature=0.8, top_k=9, top_p=0.9, min_p=0.01, repetition_penalty=1.3),
        SamplingSettings(repetition_penalty=1.3),
    ):
        sampler, again = RowSampler(settings, row=2), RowSampler(settings, row=2)
        for _ in range(5):
            p_V = sampler.probabilities(logits_V, [3, 9])
            assert float(p_V.sum()) == pytest.approx(1.0, abs=1e-5)
            assert sampler.draw(p_V) == again.next_token(logits_V, [3, 9])


def test_rows_chosen_together_are_those_chosen_one_by_one() -> None:
    cases = [
        SamplingSettings(),
        SamplingSettings(repetition_penalty=3.0),
        SamplingSettings(temperature=1.0, seed=4),
    ]
    together, alone = ([RowSampler(s, row) for row, s in enumerate(cases)] for _ in range(2))
    seen = [[row] for row in range(len(cases))]
    logits_BV = torch.stack(LOGITS[: len(cases)])
    expected = [
        sampler.next_token(logits_V, text)
        for sampler, logits_V, text in zip(alone, logits_BV, seen, strict=True)
    ]
    assert next_tokens(together, logits_BV, seen) == expected


def test_acceptance_has_the_probability_asked_for() -> None:
    sampler = RowSampler(SamplingSettings(), row=0)
    shares = {
        ratio: sum(sampler.accepts(ratio * 0.4, 0.4) for _ in range(4000)) / 4000
        for ratio in (0.0, 0.3, 1.0, 2.0)
    }
    assert shares == {0.0: 0.0, 0.3: pytest.approx(0.3, abs=0.03), 1.0: 1.0, 2.0: 1.0}
