"""What `benchmarks.spf` trains: a task, and a model whose rows learn sparsely or densely.

It measures nothing. All sparse contestants are adapters of one model: its weights are never
changed. The dense one, ordinary full fine-tuning of the same layers, has a model of its own.

Shapes: N = tokens of a step, D = hidden size, V = vocabulary.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from benchmarks.subjects import subject_folder
from cutlayer.data.load import load_dataset
from cutlayer.data.tasks import ChoiceTask, accuracy, predict
from cutlayer.data.template import Example, RowLimits
from cutlayer.data.topics import topic_settings, topic_tasks, topics, write_topics
from cutlayer.model.adapters import AdapterSettings, attach
from cutlayer.model.checkpoint import load_parts
from cutlayer.model.folder import resolve_model
from cutlayer.model.loss import completion_loss_sum
from cutlayer.model.partition import Cut, Head, Tail, Trunk
from cutlayer.model.rows import pack

__all__ = ["DENSE", "Contestant", "Model", "Task", "contestant", "load_model", "make_task"]

DENSE = "dense"
"""The contestant whose weight gradients are whole."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """Rows to learn from and questions to score."""

    model: Path
    train: Sequence[Example]
    questions: Sequence[ChoiceTask]


@dataclass(frozen=True, kw_only=True)
class Model:
    """Three parts in one process."""

    head: Head
    trunk: Trunk
    tail: Tail

    def loss(self, rows: Sequence[Example]) -> Tensor:
        """Mean cross entropy of the rows' scored tokens."""
        packed = pack([row.tokens for row in rows])
        labels_N = torch.tensor([label for row in rows for label in row.labels])
        y_ND = self.trunk(self.head(packed), packed)
        loss_sum, num_scored = completion_loss_sum(self.tail, y_ND, packed, labels_N)
        return loss_sum / num_scored

    @torch.inference_mode()
    def score(self, questions: Sequence[ChoiceTask]) -> float:
        """Share of the questions whose answer's first token has the largest logit."""
        return accuracy(questions, predict(questions, self._last_logits))

    def _last_logits(self, rows: Sequence[Sequence[int]]) -> Tensor:
        packed = pack(rows)
        last = torch.tensor(packed.offsets[1:]) - 1
        y_ND = self.trunk(self.head(packed), packed)
        logits_BV: Tensor = self.tail(y_ND, packed, select_N=last)
        return logits_BV


class Contestant:
    """One way to train."""

    def __init__(self, model: Model, ratio: float | str, lr: float) -> None:
        """Args:
        model: with no adapter of this name so far.
        ratio: share of heads and rows that learn, or `DENSE`.
        lr: of AdamW.
        """
        self.name = ratio if isinstance(ratio, str) else f"{100 * ratio:g} %"
        self.model = model
        self._adapters = []
        if isinstance(ratio, str):
            self.parameters = _dense_weights(model)
        else:
            self._adapters = [attach(p, _settings(ratio), _name(ratio)) for p in _parts(model)]
            self.parameters = [p for adapter in self._adapters for p in adapter.parameters()]
        self._adamw = torch.optim.AdamW(self.parameters, lr=lr, weight_decay=0.0, fused=True)

    def use(self) -> None:
        """The model computes with what this one has learnt."""
        for adapter in self._adapters:
            adapter.activate()

    def step(self, rows: Sequence[Example]) -> float:
        """One step of AdamW; the loss before it."""
        loss = self.model.loss(rows)
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self._adamw.step()
        self._adamw.zero_grad()
        return loss.item()

    @property
    def num_trainable(self) -> int:
        """Values that learn."""
        return sum(p.numel() for p in self.parameters)

    @property
    def optimizer_bytes(self) -> int:
        """AdamW's moments."""
        states = cast(dict[Tensor, dict[str, Tensor]], self._adamw.state)
        return sum(v.nbytes for state in states.values() for v in state.values() if v.ndim)


def contestant(model: Model, ratio: float | str, lr: float) -> Contestant:
    """A contestant on this model, active."""
    found = Contestant(model, ratio, lr)
    found.use()
    return found


def load_model(folder: Path) -> Model:
    """A model in float32, cut after its first and before its last block; the cut costs nothing."""
    files = resolve_model(folder)
    head, trunk, tail = load_parts(files, Cut(1, files.config.num_hidden_layers - 1))
    for part in (head, trunk, tail):
        part.requires_grad_(False)
    return Model(head=head, trunk=trunk, tail=tail)


def make_task(model: str | None, num_rows: int, num_questions: int, folder: Path | None) -> Task:
    """The packaged news topics on the packaged model, or made-up rows on a tiny random one.

    Args:
        model: another model; None takes the profile's own.
        num_rows: to learn from.
        num_questions: to score.
        folder: where a tiny model is written; None takes the real task.
    """
    if folder is not None:
        path = subject_folder(model, is_smoke=True, work_folder=folder)
        return Task(model=path, train=_made_up(num_rows), questions=_questions(num_questions))
    # Imported late: the smoke profile needs no asset and no network.
    from cutlayer.data.assets import fetch

    path = subject_folder(model, is_smoke=False, work_folder=Path())
    files = resolve_model(path)
    tokenizer = files.tokenizer()
    data = topics(fetch("bbcnews"), 0, num_rows, num_questions, num_words=12)
    train, heldout = write_topics(data, path.parent / "spf-rows")
    limits = RowLimits(
        context_length=files.config.max_position_embeddings, vocab_size=files.config.vocab_size
    )
    rows = load_dataset(topic_settings(train, heldout), tokenizer, limits)
    questions = topic_tasks(rows.validation, tokenizer)
    return Task(model=path, train=rows.train, questions=questions)


def _parts(model: Model) -> tuple[Head, Trunk, Tail]:
    return model.head, model.trunk, model.tail


def _settings(ratio: float) -> AdapterSettings:
    sparse = {"qkv_ratio": ratio, "dense_ratio": ratio}
    return AdapterSettings.model_validate({"kinds": ["sparse"], "sparse": sparse})


def _name(ratio: float) -> str:
    return f"share-{round(1000 * ratio)}"


def _dense_weights(model: Model) -> list[nn.Parameter]:
    """Weights of all linear layers of the blocks, which learn by plain autograd."""
    weights = []
    for part in _parts(model):
        for module in part.base.get_submodule(part.layout.blocks).modules():
            if isinstance(module, nn.Linear | Conv1D):
                weights.append(module.weight.requires_grad_(True))
    return weights


def _made_up(count: int) -> list[Example]:
    """Rows whose last token repeats the first."""
    chooser = random.Random(0)
    rows = []
    for number in range(count):
        tokens = [10 + number % 4, *(chooser.randrange(20, 250) for _ in range(40))]
        tokens.append(tokens[0])
        labels = [-100] * (len(tokens) - 1) + tokens[-1:]
        rows.append(Example(tokens=tokens, labels=labels, row_id=number))
    return rows


def _questions(count: int) -> list[ChoiceTask]:
    choices = tuple((10 + index,) for index in range(4))
    return [ChoiceTask(tuple(r.tokens[:-1]), choices, r.tokens[0] - 10) for r in _made_up(count)]
