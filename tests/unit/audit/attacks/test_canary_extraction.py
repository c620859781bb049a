"""A model that has learnt a canary gives it away; one that has not does not know it."""

import itertools
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from cutlayer.audit.attack import Effort
from cutlayer.audit.attacks.canary_extraction import (
    CanaryExtraction,
    exposure,
    log_likelihoods,
)
from cutlayer.audit.evidence import Evidence
from cutlayer.audit.knowledge import CanaryFormat, Knowledge
from cutlayer.errors import ConfigError
from cutlayer.model.adapters import AdapterSettings, attach
from cutlayer.model.checkpoint import load_parts
from cutlayer.model.partition import Trunk
from cutlayer.model.rows import pack
from tests.audit_worlds import tiny_knowledge

PREFIX = (84, 104, 101, 32, 99, 111, 100, 101, 32)
SECRET = (52, 49, 55, 57)
KNOWN = CanaryFormat(prefix=PREFIX, num_tokens=4, alphabet=tuple(range(48, 58)))
EVIDENCE = Evidence(observations=())


def learnt(knowledge: Knowledge) -> dict[str, torch.Tensor]:
    """The trunk adapter of a run whose rows had the canary."""
    head, trunk, tail = load_parts(knowledge.folder, knowledge.cut)
    adapter = attach(trunk, AdapterSettings(rank=8))
    optimizer = torch.optim.Adam(adapter.parameters(), lr=0.02)
    packed = pack([[*PREFIX, *SECRET]])
    for _ in range(80):
        optimizer.zero_grad()
        logits_NV = tail(trunk(head(packed), packed.without_tokens()), packed.without_tokens())
        places = slice(len(PREFIX) - 1, -1)
        torch.nn.functional.cross_entropy(logits_NV[places], torch.tensor(SECRET)).backward()
        optimizer.step()
    return adapter.state()


def test_a_server_reads_a_canary_from_its_own_adapter(tmp_path: Path) -> None:
    knowledge = tiny_knowledge(tmp_path)
    state = learnt(knowledge)

    def adapt(trunk: Trunk) -> None:
        attach(trunk, AdapterSettings(rank=8)).load(state)

    told = replace(knowledge, canaries=(KNOWN,), adapt_trunk=adapt)
    (guess,) = CanaryExtraction().reconstruct(EVIDENCE, told, Effort())
    assert guess.tokens == SECRET
    assert len(guess.confidences) == 4
    assert min(guess.confidences) > 0.5
    assert exposure(knowledge, KNOWN, SECRET, num_others=255) < 8.0, "others see the public trunk"
    adapt(knowledge.trunk)
    assert exposure(knowledge, KNOWN, SECRET, num_others=255) == 8.0


def test_a_model_that_never_saw_a_canary_does_not_single_it_out(tmp_path: Path) -> None:
    knowledge = tiny_knowledge(tmp_path)
    secrets = [tuple(48 + (7 * n + 3 * k * k) % 10 for k in range(4)) for n in range(12)]
    found = [exposure(knowledge, KNOWN, secret, num_others=63, seed=1) for secret in secrets]
    # Uniform ranks have 1.44 bits on average.
    assert 0.3 < sum(found) / len(found) < 3.2
    told = replace(knowledge, canaries=(KNOWN,))
    (guess,) = CanaryExtraction().reconstruct(EVIDENCE, told, Effort())
    assert guess.tokens != SECRET


def test_likelihoods_are_those_of_each_candidate_alone(tmp_path: Path) -> None:
    knowledge = tiny_knowledge(tmp_path)
    candidates = [SECRET, (48, 48, 48, 48), (57, 56, 55, 54)]
    together_K = log_likelihoods(knowledge, PREFIX, candidates)
    alone = [log_likelihoods(knowledge, PREFIX, [c])[0] for c in candidates]
    torch.testing.assert_close(together_K, torch.stack(alone), rtol=1e-5, atol=1e-5)


def test_without_any_known_form_it_says_what_it_needs(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="planted in a fine-tune"):
        CanaryExtraction().reconstruct(EVIDENCE, tiny_knowledge(tmp_path), Effort())


def test_out_of_time_a_canary_is_not_guessed(tmp_path: Path) -> None:
    told = replace(tiny_knowledge(tmp_path), canaries=(KNOWN, KNOWN))
    looks = itertools.count()
    effort = Effort(seconds=7.0, clock_s=lambda: float(next(looks)))
    first, second = CanaryExtraction().reconstruct(EVIDENCE, told, effort)
    assert (first.num_unfinished, second.num_unfinished) == (0, 4)
    assert set(second.tokens) == {-1}
