"""The chain of rounds: one digest that stands for every round so far.

It signs nothing: a coordinator that invents a whole history is found by whoever knows another one.
"""

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor

__all__ = ["first_digest", "next_digest", "payload_digest"]


def payload_digest(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256, in hex, over names, types, shapes and values, in the order of the names."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name}|{tensor.dtype}|{list(tensor.shape)}|".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data if tensor.numel() else b"")
    return digest.hexdigest()


def next_digest(digest: str, federation: str, round_number: int, payload: str) -> str:
    """The chain's end after a round.

    digest_r = SHA-256(digest_(r-1) | name | r | payload_r), all as text with "|" between.
    """
    return hashlib.sha256(f"{digest}|{federation}|{round_number}|{payload}".encode()).hexdigest()


def first_digest(federation: str, payload: str) -> str:
    """The chain's end before the first round, whose payload everybody can compute."""
    return next_digest("", federation, 0, payload)
