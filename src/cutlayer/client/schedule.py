"""The learning rate of a step: pure arithmetic."""

import math

from cutlayer.client.settings import Schedule, TrainSettings

__all__ = ["learning_rate"]


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
