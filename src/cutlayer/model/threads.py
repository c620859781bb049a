"""Compute threads of one call: decoding a small model is fastest with few of them.

Each linear layer of a decode step reads its weights once. For a small model that takes no longer
than waking a second thread, so a number that halves the time of a prompt makes tokens slower.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

__all__ = ["FEW_TOKENS", "set_threads", "with_threads"]

FEW_TOKENS = 16
"""A call of no more tokens is a decode step."""


def set_threads(number: int | None) -> None:
    """Compute with so many threads from now on; None leaves torch's own choice."""
    if number is not None:
        torch.set_num_threads(number)


@contextmanager
def with_threads(number: int | None) -> Iterator[None]:
    """Inside, torch computes with so many threads; None changes nothing."""
    before = torch.get_num_threads()
    if number is None or number == before:
        yield
        return
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)
