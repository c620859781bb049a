"""Trains an inverter on public rows and reads tokens off released rows with it.

It does not know attacks or their registry (`attacks`).

Shapes: L = vectors of one row, N = vectors of several, D = hidden size, V = vocabulary,
C = candidate tokens of a batch.
"""

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from cutlayer.audit.attack import Effort, Guess, TimeLimit, nothing_said
from cutlayer.audit.evidence import Evidence
from cutlayer.audit.inverter import Inverter, fit_linear_inverse
from cutlayer.audit.inverter_data import (
    PublicRow,
    fitted_pattern,
    noised,
    public_vectors,
    withheld_patterns,
)
from cutlayer.audit.knowledge import Knowledge
from cutlayer.privacy.mechanism import Mechanism

__all__ = ["InverterPlan", "fit_inverter", "inverter_guesses", "token_log_probs"]

_BATCH_TOKENS = 512
_NUM_NEGATIVES = 2048
_MAX_TRUSTS = 12
_LEARNING_RATE = 2e-3
_CHUNK = 256
"""Vectors whose scores over the whole vocabulary are held at once."""


@dataclass(frozen=True, kw_only=True)
class InverterPlan:
    """What distinguishes one learned inverter from another."""

    with_noise: bool = False
    """Train under the rule's own noise."""
    shift: int = 0
    """Tokens by which the targets are moved: 1 is the published decoder, which then sees only
    the vectors up to its own."""
    max_tokens: int = 40_000
    """Of public text."""
    max_steps: int = 1200
    share_of_time: float = 0.85
    """Of the effort's seconds, for making vectors and training."""


def fit_inverter(
    evidence: Evidence, knowledge: Knowledge, effort: Effort, plan: InverterPlan
) -> Inverter:
    """An inverter for this cut and rule, trained until its steps or its time are over.

    Raises:
        ConfigError: there are no public rows.
    """
    end_s = effort.clock_s() + plan.share_of_time * effort.seconds
    head_end_s = effort.clock_s() + 0.3 * plan.share_of_time * effort.seconds
    rows = public_vectors(
        knowledge, plan.max_tokens, effort.seed, lambda: effort.clock_s() >= head_end_s
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(effort.seed)
        trainer = _Trainer(evidence, knowledge, effort.seed, plan, rows)
        trainer.start()
        trainer.train(lambda: effort.clock_s() >= end_s, effort.on_progress)
    return trainer.inverter.eval()


def token_log_probs(inverter: Inverter, h_LD: Tensor) -> Iterator[Tensor]:
    """Log probabilities of every token at each vector of one row, in chunks of [at most N, V]."""
    with torch.no_grad():
        z_LD = inverter([h_LD])
        for z_ND in z_LD.split(_CHUNK):
            yield torch.log_softmax(inverter.scores(z_ND), 1)


def inverter_guesses(
    inverter: Inverter, evidence: Evidence, is_late: TimeLimit, shift: int = 0
) -> list[Guess]:
    """The likeliest token at every vector.

    Args:
        inverter: trained.
        evidence: what was recorded.
        is_late: asked before each observation; those after it are not guessed.
        shift: what vector t was trained to tell is the token at t + shift; the row's first tokens
            are then not guessed.
    """
    guesses = []
    for observation in evidence.observations:
        if is_late():
            guesses.append(nothing_said(observation.number, len(observation.h_LD)))
            continue
        best = [chunk_NV.max(1) for chunk_NV in token_log_probs(inverter, observation.h_LD)]
        tokens = [-1] * shift + [int(token) for chunk in best for token in chunk.indices]
        confidences = [0.0] * shift + [float(p.exp()) for chunk in best for p in chunk.values]
        length = len(observation.h_LD)
        guesses.append(
            Guess(
                number=observation.number,
                tokens=tuple(tokens[:length]),
                confidences=tuple(min(1.0, c) for c in confidences[:length]),
                num_unfinished=0 if inverter.is_finished else length,
            )
        )
    return guesses


class _Trainer:
    """One training run: the rows as recorded, the inverter, its optimizer."""

    def __init__(
        self,
        evidence: Evidence,
        knowledge: Knowledge,
        seed: int,
        plan: InverterPlan,
        rows: Sequence[PublicRow],
    ) -> None:
        self._plan = plan
        self._rows = rows
        self._rule: Mechanism | None = knowledge.rule if plan.with_noise else None
        self._draw = random.Random(seed)
        self._patterns = withheld_patterns(evidence.observations)
        self._share_withheld = len(self._patterns) / max(1, len(evidence.observations))
        embedding_VD = knowledge.embedding_VD.float()
        self._num_tokens = len(embedding_VD)
        start_ND = torch.cat([h_LD for h_LD, _ in self._released(rows)])
        is_inner_N = torch.cat([torch.arange(len(row.h_LD)) > 0 for row in rows])
        # Its first vector is far off in many models and would spoil the scale of the others.
        visible_N = is_inner_N & ~(start_ND == 0).all(1)
        usable_N = visible_N if int(visible_N.sum()) > 1 else torch.ones_like(visible_N)
        self.inverter = Inverter(start_ND[usable_N], embedding_VD, is_causal=plan.shift > 0)
        counts_V = torch.bincount(
            torch.cat([row.tokens_L for row in rows]), minlength=self._num_tokens
        ).float()
        self._share_V = counts_V / counts_V.sum()
        smoothed_V = counts_V + counts_V.sum() / self._num_tokens * 0.1 + 1e-3
        self.inverter.log_prior_V = (smoothed_V / smoothed_V.sum()).log()

    def start(self) -> None:
        """The linear inverse in closed form, trusted as far as it pays on the training rows."""
        batch = self._released(self._rows, is_withholding=False)
        x_ND = torch.cat([h_LD[: len(t_L)] for h_LD, t_L in batch])
        tokens_N = torch.cat([t_L for _, t_L in batch])
        inverter = self.inverter
        inverter.linear_inverse = fit_linear_inverse(
            inverter.standardised(x_ND), tokens_N, inverter.embedding_VD
        )
        sample = self._batches_of(self._rows)[0]
        released = self._released(sample, is_withholding=False)
        losses = []
        for power in range(_MAX_TRUSTS):
            inverter.log_trust.data.fill_(-0.7 * power)
            with torch.no_grad():
                losses.append(float(self._loss(released)))
        inverter.log_trust.data.fill_(-0.7 * losses.index(min(losses)))

    def train(self, is_time_up: Callable[[], bool], on_progress: Callable[[float], None]) -> None:
        """Adam with a falling rate."""
        optimizer = torch.optim.Adam(self.inverter.parameters(), lr=_LEARNING_RATE)
        total = self._plan.max_steps
        step = 0
        while True:
            for rows in self._batches_of(self._rows):
                self.inverter.is_finished = step >= total
                if self.inverter.is_finished or is_time_up():
                    return
                optimizer.param_groups[0]["lr"] = _LEARNING_RATE * (1.0 - step / total)
                optimizer.zero_grad()
                self._loss(self._released(rows)).backward()
                nn.utils.clip_grad_norm_(self.inverter.parameters(), 1.0)
                optimizer.step()
                step += 1
                on_progress(self._plan.share_of_time * step / total)

    def _batches_of(self, rows: Sequence[PublicRow]) -> list[list[PublicRow]]:
        """All rows in a new order, cut where a batch has enough tokens."""
        order = list(rows)
        self._draw.shuffle(order)
        batches: list[list[PublicRow]] = [[]]
        for row in order:
            if sum(len(taken.tokens_L) for taken in batches[-1]) >= _BATCH_TOKENS:
                batches.append([])
            batches[-1].append(row)
        return batches

    def _released(
        self, rows: Sequence[PublicRow], is_withholding: bool = True
    ) -> list[tuple[Tensor, Tensor]]:
        """Vectors as the owner's rule would have released them, and the targets, per row."""
        lengths = [len(row.h_LD) for row in rows]
        h_ND = torch.cat([row.h_LD for row in rows])
        if self._rule is not None:
            h_ND = noised(self._rule, h_ND, lengths, self._draw)
        vectors = list(h_ND.split(lengths))
        if is_withholding:
            vectors = [self._withheld(h_LD) for h_LD in vectors]
        return [
            (h_LD, row.tokens_L[self._plan.shift :])
            for h_LD, row in zip(vectors, rows, strict=True)
        ]

    def _withheld(self, h_LD: Tensor) -> Tensor:
        if not self._patterns or self._draw.random() >= self._share_withheld:
            return h_LD
        pattern_L = fitted_pattern(self._draw.choice(self._patterns), len(h_LD))
        return h_LD.masked_fill(pattern_L[:, None], 0.0)

    def _loss(self, released: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
        """Cross entropy over the batch's tokens and random others, as if over all.

        Source: importance sampling of the partition function: candidate c, which is in the set
            with probability pi_c, enters with exp(score) / pi_c.
        """
        z_ND = self.inverter([h_LD for h_LD, _ in released])
        has_target_N = torch.cat([torch.arange(len(h_LD)) < len(t) for h_LD, t in released])
        tokens_N = torch.cat([t_L for _, t_L in released])
        candidates_C, log_pi_C = self._candidates(tokens_N)
        scores_NC = self.inverter.scores(z_ND[has_target_N], candidates_C) - log_pi_C
        return nn.functional.cross_entropy(scores_NC, torch.searchsorted(candidates_C, tokens_N))

    def _candidates(self, tokens_N: Tensor) -> tuple[Tensor, Tensor]:
        """Sorted candidates and the log of the probability with which each was taken."""
        if self._num_tokens <= 2 * _NUM_NEGATIVES:
            return torch.arange(self._num_tokens), torch.zeros(self._num_tokens)
        random_C = torch.randint(self._num_tokens, (_NUM_NEGATIVES,))
        candidates_C = torch.cat([tokens_N, random_C]).unique()
        share_random = _NUM_NEGATIVES / self._num_tokens
        missed_C = (1 - share_random) * (1 - self._share_V[candidates_C]) ** len(tokens_N)
        return candidates_C, torch.log1p(-missed_C)
