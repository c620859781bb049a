"""Evidence made in memory: token rows through a head, a rule, a trunk and a tail, as a run would.

It does not record, connect or attack. The true tokens stand beside the evidence, for scoring.

Shapes: N = tokens of all rows, L = tokens of one row, D = hidden size.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from cutlayer.audit.evidence import Evidence, Observation, Update
from cutlayer.audit.knowledge import Knowledge
from cutlayer.data.assets import asset_path, is_cached
from cutlayer.model.adapters import AdapterSettings, attach
from cutlayer.model.checkpoint import load_parts
from cutlayer.model.folder import ModelFolder, resolve_model
from cutlayer.model.loss import NOT_SCORED, completion_loss_sum
from cutlayer.model.partition import Cut
from cutlayer.model.rows import pack
from cutlayer.privacy.mechanism import Mechanism, NoNoise
from cutlayer.privacy.noise import RowNoise
from tests.tiny_models import tiny_model

__all__ = [
    "SENTENCES",
    "World",
    "public_tokens",
    "random_rows",
    "same_norm_noise",
    "smollm2_knowledge",
    "smollm2_world",
    "text_rows",
    "tiny_knowledge",
    "tiny_world",
    "update_of",
    "world_of",
]

SENTENCES = (
    "The patient was admitted on 14 March with chest pain and a history of atrial fibrillation.",
    "Ms Oduya asked for the contract to be ended because the landlord ignored her letters.",
    "Deliver the spare turbine blades to the depot at Kirkwall before the storm closes the port.",
    "I loved the first half of the film, but the ending felt rushed and strangely cheerful.",
    "After the merger both teams will report to Helena Brandt, who moves to the Lyon office.",
    "His blood sugar stayed above 11 for three days although the insulin dose was doubled.",
    "The phone works well, yet the battery dies by noon and the charger smells of burnt plastic.",
    "Our council voted nine to four against the new bypass through the old orchard.",
)
"""Texts of eight owners, made up."""


@dataclass(frozen=True, kw_only=True)
class World:
    """What the attacker has and, beside it, what was hidden."""

    evidence: Evidence
    knowledge: Knowledge
    tokens: tuple[tuple[int, ...], ...] = field(repr=False)
    """Per observation, by its number."""
    labels: tuple[tuple[int, ...], ...] = field(repr=False)
    """As labels are aligned, -100 where not scored."""
    private: tuple[tuple[bool, ...], ...] = field(repr=False)
    """Per token."""

    def recovery(self, guesses: Sequence[Sequence[int]]) -> float:
        """Share of private tokens that are right; one row of guesses per observation."""
        pairs = [
            (guess, token)
            for row, tokens, flags in zip(guesses, self.tokens, self.private, strict=True)
            for guess, token, flag in zip(row, tokens, flags, strict=True)
            if flag
        ]
        return sum(guess == token for guess, token in pairs) / len(pairs)


def tiny_world(
    tmp_path: Path,
    rows: Sequence[Sequence[int]] | None = None,
    rule: Mechanism | None = None,
    gradient_rule: Mechanism | None = None,
    cut: Cut = Cut(1, 3),  # noqa: B008 - frozen
    num_epochs: int = 1,
    family: str = "llama",
) -> World:
    """A world over a tiny random model; by default 6 rows of 8 to 13 random tokens."""
    knowledge = tiny_knowledge(tmp_path, rule, gradient_rule, cut, family)
    return world_of(knowledge, rows or random_rows(6, 8), num_epochs=num_epochs)


def smollm2_world(
    rule: Mechanism | None = None,
    gradient_rule: Mechanism | None = None,
    cut: Cut = Cut(2, 28),  # noqa: B008 - frozen
    num_rows: int = 2,
    num_epochs: int = 1,
) -> World:
    """A world over SmolLM2-135M and `SENTENCES`; the calling test is skipped without the model."""
    knowledge = smollm2_knowledge(rule, gradient_rule, cut)
    rows = text_rows(knowledge, SENTENCES[:num_rows])
    return world_of(knowledge, rows, num_epochs=num_epochs)


def tiny_knowledge(
    tmp_path: Path,
    rule: Mechanism | None = None,
    gradient_rule: Mechanism | None = None,
    cut: Cut = Cut(1, 3),  # noqa: B008 - frozen
    family: str = "llama",
) -> Knowledge:
    """What an attacker knows of a tiny random model; 16 public rows of random tokens."""
    folder = ModelFolder(tiny_model(family, tmp_path)[0])
    return Knowledge(
        folder=folder,
        cut=cut,
        rule=rule or NoNoise(),
        gradient_rule=gradient_rule or NoNoise(),
        public_rows=random_rows(16, 8, seed=1),
    )


def smollm2_knowledge(
    rule: Mechanism | None = None,
    gradient_rule: Mechanism | None = None,
    cut: Cut = Cut(2, 28),  # noqa: B008 - frozen
) -> Knowledge:
    """What an attacker knows of SmolLM2-135M; the public rows are `public_tokens`."""
    if not is_cached("smollm2"):
        pytest.skip("SmolLM2 is not in the cache: cutlayer assets fetch smollm2")
    known = Knowledge(
        folder=resolve_model(asset_path("smollm2")),
        cut=cut,
        rule=rule or NoNoise(),
        gradient_rule=gradient_rule or NoNoise(),
    )
    return replace(known, public_rows=public_tokens(known))


def world_of(
    knowledge: Knowledge,
    rows: Sequence[Sequence[int]],
    labels: Sequence[Sequence[int]] | None = None,
    private: Sequence[Sequence[bool]] | None = None,
    num_epochs: int = 1,
    with_gradients: bool = True,
) -> World:
    """Run token rows through the split model, and cut the row's own evidence apart.

    Args:
        knowledge: the model, the cut and both rules; T2 parts are used as they are.
        rows: tokens of each row.
        labels: as labels are aligned; by default the last two tokens of each row are scored.
        private: per token; by default all are.
        num_epochs: times over the rows, one step each, with fresh noise in every step.
        with_gradients: whether gradients were recorded at both cuts.
    """
    labels = labels or [[NOT_SCORED] * (len(row) - 2) + list(row[-2:]) for row in rows]
    private = private or [[True] * len(row) for row in rows]
    observations: list[Observation] = []
    for epoch in range(num_epochs):
        for index, (row, row_labels) in enumerate(zip(rows, labels, strict=True)):
            key = f"epoch {epoch} row {index}"
            made = _observe(knowledge, row, row_labels, key, with_gradients)
            observations.append(replace(made, number=len(observations), step=epoch + 1))
    return World(
        evidence=Evidence(observations=tuple(observations)),
        knowledge=knowledge,
        tokens=tuple(tuple(row) for row in rows) * num_epochs,
        labels=tuple(tuple(row) for row in labels) * num_epochs,
        private=tuple(tuple(row) for row in private) * num_epochs,
    )


def same_norm_noise(evidence: Evidence, seed: int = 0) -> Evidence:
    """The same evidence with every tensor replaced by noise, each vector with its old norm."""
    generator = torch.Generator().manual_seed(seed)

    def noised(x_LD: Tensor | None) -> Tensor | None:
        if x_LD is None:
            return None
        noise_LD = torch.randn(x_LD.shape, generator=generator)
        return noise_LD * (x_LD.norm(dim=1, keepdim=True) / noise_LD.norm(dim=1, keepdim=True))

    observations = []
    for seen in evidence.observations:
        h_LD = noised(seen.h_LD)
        assert h_LD is not None
        changed = replace(
            seen,
            h_LD=h_LD,
            y_LD=noised(seen.y_LD),
            gradient_LD=noised(seen.gradient_LD),
            input_gradient_LD=noised(seen.input_gradient_LD),
        )
        observations.append(changed)
    updates = [
        replace(
            update, tensors={name: _noise_like(x, generator) for name, x in update.tensors.items()}
        )
        for update in evidence.updates
    ]
    return Evidence(observations=tuple(observations), updates=tuple(updates))


def update_of(
    knowledge: Knowledge,
    rows: Sequence[Sequence[int]],
    labels: Sequence[Sequence[int]],
    lr: float = 0.01,
    rank: int = 8,
) -> Update:
    """What one plain gradient step over all rows changes of fresh adapters of head and tail."""
    head, trunk, tail = load_parts(knowledge.folder, knowledge.cut)
    adapters = [attach(part, AdapterSettings(rank=rank)) for part in (head, tail)]
    packed = pack(rows)
    labels_N = torch.tensor([label for row in labels for label in row])
    y_ND = trunk(head(packed), packed.without_tokens())
    loss_sum, num_scored = completion_loss_sum(tail, y_ND, packed, labels_N)
    (loss_sum / num_scored).backward()
    changes = {key: -lr * x for adapter in adapters for key, x in adapter.gradients().items()}
    return Update(round=1, tensors=changes)


def random_rows(num_rows: int, min_length: int, seed: int = 0) -> list[list[int]]:
    """Rows of random byte tokens, of `min_length` to `min_length` + 5 tokens."""
    generator = torch.Generator().manual_seed(seed)
    lengths = [min_length + index % 6 for index in range(num_rows)]
    return [torch.randint(0, 256, (n,), generator=generator).tolist() for n in lengths]


def text_rows(knowledge: Knowledge, texts: Sequence[str]) -> list[list[int]]:
    """Token rows of texts."""
    return [knowledge.tokenizer.encode(text, add_special_tokens=False) for text in texts]


def public_tokens(
    knowledge: Knowledge, num_rows: int = 64, max_tokens: int = 48
) -> list[list[int]]:
    """Rows of public text of another kind than `SENTENCES`: the news corpus, where it is cached."""
    if not is_cached("bbcnews"):
        pytest.skip("the news corpus is not in the cache: cutlayer assets fetch bbcnews")
    paths = sorted(asset_path("bbcnews").rglob("*.txt"))[:: max(1, 2000 // num_rows)][:num_rows]
    texts = [path.read_text(encoding="utf-8", errors="replace")[:2000] for path in paths]
    return [row[:max_tokens] for row in text_rows(knowledge, texts)]


def _observe(
    knowledge: Knowledge,
    tokens: Sequence[int],
    labels: Sequence[int],
    key: str,
    with_gradients: bool,
) -> Observation:
    rows = pack([tokens])
    head, tail = knowledge.parts
    with torch.no_grad():
        h_LD = knowledge.rule.apply(head(rows), _noise(f"h {key}", len(tokens)))
    h_LD = h_LD.clone().requires_grad_(with_gradients)
    y_LD = knowledge.trunk(h_LD, rows.without_tokens())
    seen = Observation(
        number=0, phase="training", step=1, start=0, h_LD=h_LD.detach(), y_LD=y_LD.detach()
    )
    if not with_gradients:
        return seen
    tail_input_LD = y_LD.detach().requires_grad_()
    loss_sum, _ = completion_loss_sum(tail, tail_input_LD, rows, torch.tensor(labels))
    loss_sum.backward()
    assert tail_input_LD.grad is not None
    gradient_LD = knowledge.gradient_rule.apply(
        tail_input_LD.grad, _noise(f"gradient {key}", len(tokens))
    )
    y_LD.backward(gradient_LD)
    assert h_LD.grad is not None
    return replace(seen, gradient_LD=gradient_LD, input_gradient_LD=h_LD.grad)


def _noise_like(x: Tensor, generator: torch.Generator) -> Tensor:
    noise = torch.randn(x.shape, generator=generator)
    return noise * (x.norm() / noise.norm())


def _noise(name: str, length: int) -> RowNoise:
    return RowNoise([hashlib.sha256(f"a fixed test secret {name}".encode()).digest()], [length])
