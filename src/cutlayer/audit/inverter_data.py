"""Public rows as an attacker would have recorded them: head output, clipped, noised, withheld.

It does not train anything, and never sees a row of the owner.

Shapes: L = vectors of one row, N = vectors of several, D = hidden size.
"""

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from cutlayer.audit.evidence import Observation
from cutlayer.audit.knowledge import Knowledge
from cutlayer.errors import ConfigError
from cutlayer.model.rows import pack
from cutlayer.privacy.mechanism import Mechanism
from cutlayer.privacy.noise import RowNoise

__all__ = ["PublicRow", "fitted_pattern", "noised", "public_vectors", "withheld_patterns"]

_PACK_TOKENS = 1024
_KEY_BYTES = 32


@dataclass(frozen=True, kw_only=True)
class PublicRow:
    """One row of public text with the vectors that the public head makes of it."""

    tokens_L: Tensor = field(repr=False)
    h_LD: Tensor = field(repr=False)


def public_vectors(
    knowledge: Knowledge, max_tokens: int, seed: int, is_time_up: Callable[[], bool]
) -> list[PublicRow]:
    """Public rows through the head that the attacker has, as many as limit and time allow.

    Args:
        knowledge: with the head and the public rows.
        max_tokens: of all rows.
        seed: of the choice of rows.
        is_time_up: asked after every thousand tokens; the first are made in any case.

    Raises:
        ConfigError: there are no public rows.
    """
    if not knowledge.public_rows:
        raise ConfigError(
            "this attack learns from public text and the knowledge has no public rows; give it "
            "text of the same kind as the owner's"
        )
    head, _ = knowledge.parts
    rows: list[PublicRow] = []
    for group in _groups(_as_recorded(knowledge, seed), max_tokens):
        packed = pack(group)
        assert packed.tokens_N is not None
        with torch.no_grad():
            h_ND = head(packed).float()
        pieces = zip(packed.tokens_N.split(packed.lengths), h_ND.split(packed.lengths), strict=True)
        rows += [PublicRow(tokens_L=tokens_L, h_LD=h_LD) for tokens_L, h_LD in pieces]
        if is_time_up():
            break
    return rows


def _as_recorded(knowledge: Knowledge, seed: int) -> Iterator[list[int]]:
    """The rows in a random order, each ending as the owner's rows do."""
    template = list(knowledge.template)
    order = list(range(len(knowledge.public_rows)))
    random.Random(seed).shuffle(order)
    for index in order:
        row = list(knowledge.public_rows[index])
        if template and row[-len(template) :] != template:
            row += template
        if row:
            yield row


def _groups(rows: Iterator[list[int]], max_tokens: int) -> Iterator[list[list[int]]]:
    """Runs of rows, each about a thousand tokens, until the limit is reached."""
    group: list[list[int]] = []
    num_group = num_all = 0
    for row in rows:
        group.append(row)
        num_group += len(row)
        num_all += len(row)
        if num_group >= _PACK_TOKENS or num_all >= max_tokens:
            yield group
            group, num_group = [], 0
        if num_all >= max_tokens:
            return
    if group:
        yield group


def noised(rule: Mechanism, h_ND: Tensor, lengths: Sequence[int], draw: random.Random) -> Tensor:
    """Packed rows as the rule would release them, with noise of the attacker's own."""
    keys = [draw.randbytes(_KEY_BYTES) for _ in lengths]
    return rule.apply(h_ND, RowNoise(keys, lengths))


def withheld_patterns(observations: Sequence[Observation]) -> list[Tensor]:
    """Per observation with zero vectors in it: where they are, bool [L]."""
    patterns = [(observation.h_LD == 0).all(1) for observation in observations]
    return [pattern_L for pattern_L in patterns if bool(pattern_L.any())]


def fitted_pattern(pattern_L: Tensor, length: int) -> Tensor:
    """A pattern on a row of another length: both ends stay as they are, the middle stretches.

    Args:
        pattern_L: where vectors were withheld in a row of the owner.
        length: vectors of the other row.
    """
    if not bool(pattern_L.any()):
        return torch.zeros(length, dtype=torch.bool)
    hidden = pattern_L.nonzero().squeeze(1)
    first, last = int(hidden[0]), int(hidden[-1])
    middle_M, num_end = pattern_L[first : last + 1], len(pattern_L) - 1 - last
    num_middle = length - first - num_end
    if num_middle < 1:
        return pattern_L[-length:] if length <= len(pattern_L) else pattern_L
    stretched = torch.arange(num_middle) * len(middle_M) // num_middle
    return torch.cat([pattern_L[:first], middle_M[stretched], pattern_L[last + 1 :]])
