"""Smashed-data matching: input embeddings are moved until the head makes what was released.

It starts from each vector's own best token and ends at the nearest rows of the embedding.

Shapes: L = vectors of one row, D = hidden size, V = vocabulary.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from cutlayer.audit.attack import ATTACKS, Aim, Effort, Guess, time_limit
from cutlayer.audit.calibration import CALIBRATION_SHARE, calibrate
from cutlayer.audit.chains import Chain, chains, guesses_of, known_places, nothing_of
from cutlayer.audit.embedding_rows import nearest_rows, rows_of
from cutlayer.audit.evidence import Evidence
from cutlayer.audit.knowledge import Knowledge
from cutlayer.audit.known_noise import KnownNoise, ReleasedSpace, are_withheld, known_noise
from cutlayer.audit.matching import Deadline, Matching
from cutlayer.model.partition import Head
from cutlayer.model.rows import Rows

__all__ = ["SmashedDataMatching"]

_STEPS = 200
_STEPS_BETWEEN_LOOKS = 10
"""At the clock."""
_STEP_SHARE = 0.3
"""Length of the first step, as a share of the embedding's standard deviation; it falls to 0."""


@ATTACKS.register("smashed_data_matching")
class SmashedDataMatching:
    """Gradient descent on the inputs of the head, under the known noise.

    The loss is |h - clip(head(e))|^2 / (2 s^2) plus a normal prior on e with the embedding's own
    mean and variance: without it noise would be fitted with inputs that no token has.

    Source: BiSR, arXiv 2409.00960, forward matching (f); the prior is an addition.
    """

    aim = Aim.TOKENS
    about = "optimise inputs until the head's output matches (BiSR f, arXiv 2409.00960)"

    def reconstruct(self, evidence: Evidence, knowledge: Knowledge, effort: Effort) -> list[Guess]:
        """See `Attack`."""
        left_s = Deadline(effort)
        head = knowledge.parts[0]
        rows_VD = rows_of(head.base.get_input_embeddings())
        noise = known_noise(knowledge.rule, rows_VD.shape[1])
        known = calibrate(knowledge, effort.seed, time_limit(effort, CALIBRATION_SHARE))
        matching = Matching(knowledge, ReleasedSpace(noise), left_s, known)
        rows = chains(evidence.observations)
        guesses: list[Guess] = []
        for index, chain in enumerate(rows):
            if left_s.is_late():
                guesses += nothing_of(chain)
                continue
            start = matching.each_alone(chain)
            if left_s() <= 0:
                guesses += guesses_of(chain, start, [0.0] * chain.length, 0, chain.length)
                continue
            factor = matching.shortlist.factor(chain.length)
            inputs = _Inputs(head, rows_VD, noise, factor)
            embeds_LD, is_done = inputs.fit(chain, start, left_s)
            tokens, shares = nearest_rows(embeds_LD, rows_VD)
            for place, token in known_places(chain, knowledge.template).items():
                tokens[place] = token
            guesses += guesses_of(chain, tokens, shares, 0, 0 if is_done else chain.length)
            effort.on_progress((index + 1) / len(rows))
        return guesses


class _Inputs:
    """Input embeddings of one row."""

    def __init__(self, head: Head, rows_VD: Tensor, noise: KnownNoise, row_factor: float) -> None:
        self._head, self._rows_VD = head, rows_VD
        self._noise, self._row_factor = noise, row_factor
        self._mean_D, self._variance_D = rows_VD.mean(0), rows_VD.var(0) + 1e-12

    def fit(
        self, chain: Chain, start: tuple[int, ...], left_s: Callable[[], float]
    ) -> tuple[Tensor, bool]:
        """Embeddings [L, D] after the descent, and whether it was finished."""
        h_LD = chain.h_LD
        are_there = ~are_withheld(h_LD)
        embeds_LD = self._rows_VD[torch.tensor(start)].clone().requires_grad_()
        # Sizes of vectors differ: without noise each counts by its own.
        scale_L1 = self._noise.variance + 1e-4 * h_LD.square().mean(1, keepdim=True) + 1e-12
        step = _STEP_SHARE * float(self._variance_D.mean().sqrt())
        optimizer = torch.optim.Adam([embeds_LD], lr=step)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, _STEPS)
        rows = Rows(lengths=(chain.length,), starts=(0,))
        for number in range(_STEPS):
            if number % _STEPS_BETWEEN_LOOKS == 0 and left_s() <= 0:
                return embeds_LD.detach(), False
            optimizer.zero_grad()
            made_LD = self._head.run_blocks(embeds_LD, rows)
            off_LD = (self._noise.clipped(made_LD, self._row_factor) - h_LD)[are_there]
            prior = ((embeds_LD - self._mean_D).square() / self._variance_D).sum() / 2
            loss = (off_LD.square() / (2 * scale_L1[are_there])).sum() + prior
            loss.backward()
            optimizer.step()
            schedule.step()
        return embeds_LD.detach(), True
