"""Which rows a step has and what its learning rate is: pure arithmetic."""

import math

from cutlayer.client.settings import Schedule, TrainSettings
from cutlayer.data.batches import BatchPlan
from cutlayer.data.load import Dataset

__all__ = ["batch_plan", "learning_rate"]


def learning_rate(step: int, num_steps: int, settings: TrainSettings) -> float:
    """Learning rate of a step; equals transformers' get_scheduler of the same name.

    Args:
        step: from 1.
        num_steps: steps of the whole run.
        settings: highest rate, warm-up steps and form.
    """
    done = step - 1
    if done < settings.warmup_steps:
        return settings.lr * done / max(1, settings.warmup_steps)
    rest = max(1, num_steps - settings.warmup_steps)
    progress = min(1.0, (done - settings.warmup_steps) / rest)
    if settings.schedule is Schedule.CONSTANT:
        return settings.lr
    if settings.schedule is Schedule.LINEAR:
        return settings.lr * (1.0 - progress)
    return settings.lr * 0.5 * (1.0 + math.cos(math.pi * progress))


def batch_plan(rows: Dataset, settings: TrainSettings) -> BatchPlan:
    """The rows of every step of a run."""
    return BatchPlan(
        num_rows=len(rows.train),
        rows_per_step=min(settings.rows_per_step, len(rows.train)),
        seed=settings.seed,
        epochs=settings.epochs,
        steps=settings.steps,
        micro_batch_rows=settings.micro_batch_rows,
        micro_batch_tokens=settings.micro_batch_tokens,
        lengths=tuple(len(example.tokens) for example in rows.train),
    )
