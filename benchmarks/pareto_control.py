"""The control of the plane: the same head and tail trained without the trunk, y = h.

It sees every token, noise-free, and trains longer: what it cannot do, the trunk does.
"""

import random

import torch

from benchmarks.pareto_task import Task
from cutlayer.client.parts import TrainedParts
from cutlayer.data.batches import Batch, batch
from cutlayer.data.load import Dataset, load_dataset
from cutlayer.data.template import NOT_SCORED, RowLimits
from cutlayer.model.adapters import AdapterSettings
from cutlayer.model.checkpoint import load_client_parts
from cutlayer.model.folder import resolve_model
from cutlayer.model.loss import completion_loss_sum
from cutlayer.model.optimizer import AdamWSettings, gradient_scale
from cutlayer.model.partition import Cut

__all__ = ["control_accuracy"]

_CLIP_NORM = 1.0
_ROWS_PER_CALL = 10


def control_accuracy(task: Task, cut: tuple[int, int]) -> float:
    """Accuracy of head and tail alone on the held-out rows.

    Args:
        task: rows, model and sizes.
        cut: blocks of the head, first block of the tail.
    """
    torch.set_num_threads(task.threads)
    folder = resolve_model(str(task.model))
    head, tail = load_client_parts(folder, Cut(*cut))
    parts = TrainedParts(head, tail, AdapterSettings(), AdamWSettings(), seed=0)
    limits = RowLimits(context_length=folder.config.max_position_embeddings)
    rows = load_dataset(task.data_settings(), folder.tokenizer(), limits)
    parts.use_adapters(True)
    parts.set_training(True)
    _train(parts, rows, task)
    parts.set_training(False)
    return _accuracy(parts, rows)


def _train(parts: TrainedParts, rows: Dataset, task: Task) -> None:
    order = random.Random("control")
    for step in range(task.sizes.control_steps):
        chosen = batch(rows.train, order.sample(range(len(rows.train)), task.sizes.rows_per_step))
        loss_sum, num_scored = _loss(parts, chosen)
        loss_sum.backward()
        lr = task.sizes.lr * (1 - step / task.sizes.control_steps)
        parts.step(gradient_scale(parts.sq_norm(), num_scored, _CLIP_NORM), lr)


def _loss(parts: TrainedParts, chosen: Batch) -> tuple[torch.Tensor, int]:
    y_ND = parts.head_forward(chosen.rows)
    return completion_loss_sum(parts.tail, y_ND, chosen.rows, chosen.labels_N)


@torch.no_grad()
def _accuracy(parts: TrainedParts, rows: Dataset) -> float:
    answers = sorted({_answer(row.labels) for row in (*rows.train, *rows.validation)})
    hits = 0
    for first in range(0, len(rows.validation), _ROWS_PER_CALL):
        places = range(first, min(first + _ROWS_PER_CALL, len(rows.validation)))
        chosen = batch(rows.validation, places)
        before = torch.tensor(chosen.rows.offsets[1:]) - 2
        logits_BV = parts.tail(parts.head_forward(chosen.rows), chosen.rows, select_N=before)
        best = logits_BV[:, answers].argmax(-1).tolist()
        right = [answers.index(_answer(rows.validation[place].labels)) for place in places]
        hits += sum(one == other for one, other in zip(best, right, strict=True))
    return hits / len(rows.validation)


def _answer(labels: list[int]) -> int:
    """The one scored token, which is a row's last."""
    (answer,) = [label for label in labels if label != NOT_SCORED]
    return answer
