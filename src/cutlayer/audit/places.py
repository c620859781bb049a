"""Rows from which vectors stayed, laid out again with nothing in the place of what stayed.

The server does not see where in a row a vector stood; attacks are told, so that they can read what
left in its place and guess the rest from there: an audit errs to the safe side. It attacks nothing.

Shapes: M = vectors of a row that left, L = tokens of the row, D = hidden size.
"""

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from cutlayer.audit.evidence import Evidence, Observation
from cutlayer.audit.truth import Hidden
from cutlayer.model.loss import NOT_SCORED

__all__ = ["with_answers", "with_places"]

Case = tuple[Evidence, dict[int, Hidden]]


def with_places(evidence: Evidence, hidden: Mapping[int, Hidden]) -> Case:
    """Zeros in every place whose vector stayed: for attacks that read what left."""
    return _laid_out(evidence, hidden, is_everywhere=True)


def with_answers(evidence: Evidence, hidden: Mapping[int, Hidden]) -> Case:
    """Zeros in the places of scored tokens alone, behind what predicts them: for attacks that
    compute the tail, which never saw the other places."""
    return _laid_out(evidence, hidden, is_everywhere=False)


def _laid_out(evidence: Evidence, hidden: Mapping[int, Hidden], is_everywhere: bool) -> Case:
    known = dict(hidden)
    observations = []
    for seen in evidence.observations:
        truth = known.get(seen.number)
        if truth is not None and any(truth.stays):
            places = [p for p in range(len(truth.tokens)) if is_everywhere or _matters(truth, p)]
            seen = _spread(seen, torch.tensor([not truth.stays[place] for place in places]))
            known[seen.number] = _part(truth, places)
        observations.append(seen)
    return replace(evidence, observations=tuple(observations)), known


def _matters(truth: Hidden, place: int) -> bool:
    is_scored = bool(truth.labels) and truth.labels[place] != NOT_SCORED
    return is_scored or not truth.stays[place]


def _part(truth: Hidden, places: list[int]) -> Hidden:
    return replace(
        truth,
        tokens=tuple(truth.tokens[place] for place in places),
        labels=tuple(truth.labels[place] for place in places) if truth.labels else (),
        private=tuple(truth.private[place] for place in places) if truth.private else (),
        stays=tuple(truth.stays[place] for place in places),
    )


def _spread(seen: Observation, left_L: Tensor) -> Observation:
    def spread(x_MD: Tensor | None) -> Tensor | None:
        if x_MD is None:
            return None
        x_LD = x_MD.new_zeros(len(left_L), x_MD.shape[1])
        x_LD[left_L] = x_MD
        return x_LD

    h_LD = spread(seen.h_LD)
    assert h_LD is not None
    return replace(
        seen,
        h_LD=h_LD,
        y_LD=spread(seen.y_LD),
        gradient_LD=spread(seen.gradient_LD),
        input_gradient_LD=spread(seen.input_gradient_LD),
    )
