"""What a trained model has kept of planted secrets: the rest of a canary from its known beginning.

It reads no released tensor: its evidence is the model that the attacker has. Under T1 that is the
public model with the trunk adapter, which the server trains; under T2 head and tail adapters too.

Shapes: K = candidates, V = vocabulary.
"""

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from cutlayer.audit.attack import (
    ATTACKS,
    Aim,
    Effort,
    Guess,
    TimeLimit,
    nothing_said,
    time_limit,
)
from cutlayer.audit.evidence import Evidence
from cutlayer.audit.knowledge import CanaryFormat, Knowledge
from cutlayer.errors import ConfigError
from cutlayer.model.rows import Rows, pack

__all__ = ["CanaryExtraction", "exposure", "log_likelihoods"]

_WIDTH = 16
"""Beams of the search."""
_CHUNK = 64


@ATTACKS.register("canary_extraction")
class CanaryExtraction:
    """Beam search for the likeliest secret behind each known prefix.

    Source: Carlini et al., The Secret Sharer (arXiv 1802.08232), sections 4 and 5.
    """

    aim = Aim.CANARIES
    about = "likeliest secret behind a known prefix (The Secret Sharer, arXiv 1802.08232)"

    def reconstruct(self, evidence: Evidence, knowledge: Knowledge, effort: Effort) -> list[Guess]:
        """One guess per format, numbered by its place; of the evidence nothing is read.

        Raises:
            ConfigError: no canaries are known.
        """
        if not knowledge.canaries:
            raise ConfigError(
                "canary_extraction needs canaries that were planted in a fine-tune: an audit "
                "plants some in phase trained, with audit.canaries above 0 and nothing withheld"
            )
        is_time_up = time_limit(effort)
        knowledge = _with_trunk(knowledge)
        guesses = []
        for number, known in enumerate(knowledge.canaries):
            found = _search(knowledge, known, is_time_up)
            guesses.append(
                nothing_said(number, known.num_tokens)
                if found is None
                else Guess(number=number, tokens=found[0], confidences=found[1])
            )
            effort.on_progress((number + 1) / len(knowledge.canaries))
        return guesses


def _with_trunk(knowledge: Knowledge) -> Knowledge:
    """With the run's adapter on a trunk of its own: other attacks share the public one."""
    if knowledge.adapt_trunk is None:
        return knowledge
    own = replace(knowledge)
    knowledge.adapt_trunk(own.trunk)
    own.trunk.eval().requires_grad_(False)
    return own


def exposure(
    knowledge: Knowledge, known: CanaryFormat, secret: Sequence[int], num_others: int, seed: int = 0
) -> float:
    """How much of a canary the model has kept, in bits: log2 of the candidates over its rank.

    Zero bits on average for one that the model has never seen; at most log2(num_others + 1).

    Args:
        knowledge: the model that the attacker has.
        known: the canary's format.
        secret: its tokens.
        num_others: random secrets of the same form that it is ranked among.
        seed: of these.

    Source: Carlini et al. (arXiv 1802.08232), definition 2, with the rank by sampling.
    """
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(len(known.alphabet), (num_others, known.num_tokens), generator=generator)
    others = [tuple(known.alphabet[place] for place in row) for row in drawn.tolist()]
    scores_K = log_likelihoods(knowledge, known.prefix, [tuple(secret), *others])
    rank = 1 + int((scores_K[1:] >= scores_K[0]).sum())
    return math.log2(num_others + 1) - math.log2(rank)


def log_likelihoods(
    knowledge: Knowledge, prefix: Sequence[int], candidates: Sequence[Sequence[int]]
) -> Tensor:
    """Summed log probability [K] of each candidate behind the prefix, float64."""
    found = []
    for begin in range(0, len(candidates), _CHUNK):
        chunk = candidates[begin : begin + _CHUNK]
        packed = pack([[*prefix, *candidate] for candidate in chunk])
        logits = _logits(knowledge, packed).split(packed.lengths)
        for own_LV, candidate in zip(logits, chunk, strict=True):
            first = len(prefix) - 1
            steps_LV = own_LV[first : first + len(candidate)].double().log_softmax(dim=1)
            found.append(steps_LV.gather(1, torch.tensor([candidate]).T).sum())
    return torch.stack(found)


@torch.no_grad()
def _logits(knowledge: Knowledge, packed: Rows) -> Tensor:
    head, tail = knowledge.parts
    layout = packed.without_tokens()
    logits_NV: Tensor = tail(knowledge.trunk(head(packed), layout), layout)
    return logits_NV


def _search(
    knowledge: Knowledge, known: CanaryFormat, is_time_up: TimeLimit
) -> tuple[tuple[int, ...], tuple[float, ...]] | None:
    """The best beam, with the probability of each of its tokens within the alphabet; None where
    time ended it."""
    alphabet = torch.tensor(known.alphabet)
    beams: list[tuple[float, tuple[int, ...], tuple[float, ...]]] = [(0.0, (), ())]
    for _ in range(known.num_tokens):
        if is_time_up():
            return None
        packed = pack([[*known.prefix, *tokens] for _, tokens, _ in beams])
        last = torch.tensor(packed.offsets[1:]) - 1
        scores_BK = _logits(knowledge, packed)[last][:, alphabet].double().log_softmax(dim=1)
        grown = [
            (score + step, (*tokens, token), (*shares, math.exp(step)))
            for (score, tokens, shares), steps in zip(beams, scores_BK.tolist(), strict=True)
            for step, token in zip(steps, known.alphabet, strict=True)
        ]
        beams = sorted(grown, reverse=True)[:_WIDTH]
    return beams[0][1], beams[0][2]
