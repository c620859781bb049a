"""Every published task under its name, so that commands and suites find them all.

It reads and scores nothing. A new task is a module that registers itself, and one line here.
"""

# Each import registers its tasks.
import cutlayer.evaluation.published.coqa
import cutlayer.evaluation.published.multirc
import cutlayer.evaluation.published.record
import cutlayer.evaluation.published.sentiment
import cutlayer.evaluation.published.summaries
import cutlayer.evaluation.published.superglue
import cutlayer.evaluation.published.topics  # noqa: F401
from cutlayer.evaluation.published.question import TASKS, PublishedTask

__all__ = ["published_task"]


def published_task(name: str) -> PublishedTask:
    """The task called `name`.

    Raises:
        ConfigError: no task has that name; the message lists those there are.
    """
    return TASKS.get(name)
