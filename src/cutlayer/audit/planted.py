"""Canaries as rows of a fine-tune: what is learnt of them, what an attacker knows, what is hidden.

It makes no text (`material`), trains nothing (`live`) and guesses nothing (`attacks`).
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from cutlayer.audit.knowledge import CanaryFormat
from cutlayer.audit.truth import Hidden
from cutlayer.data.template import NOT_SCORED, Example

__all__ = ["Planted", "plant"]


@dataclass(frozen=True, kw_only=True)
class Planted:
    """What an audit plants where `canary_extraction` is among its attacks."""

    rows: tuple[Example, ...] = field(repr=False)
    """To be learnt beside the owner's, each as often as a row of theirs."""
    formats: tuple[CanaryFormat, ...] = field(repr=False)
    """What the attacker is told of each."""
    hidden: dict[int, Hidden] = field(repr=False)
    """The secrets by the number of their format."""


def plant(canaries: Sequence[Example], others: Sequence[Sequence[int]]) -> Planted:
    """Make canaries learnable, and say what is known of them.

    Args:
        canaries: rows in which the secret alone is private, one run of tokens.
        others: tokens of other secrets of the same form, which tell the alphabet; where all of
            one length have the same token, that is form and no secret.
    """
    alphabet = tuple(sorted({token for tokens in others for token in tokens}))
    formats, hidden = [], {}
    for number, row in enumerate(canaries):
        first = row.is_private.index(True)
        secret = tuple(row.tokens[first : first + sum(row.is_private)])
        alike = [tokens for tokens in others if len(tokens) == len(secret)]
        formats.append(
            CanaryFormat(
                prefix=tuple(row.tokens[:first]), num_tokens=len(secret), alphabet=alphabet
            )
        )
        flags = tuple(len({tokens[n] for tokens in alike}) > 1 for n in range(len(secret)))
        hidden[number] = Hidden(tokens=secret, private=flags, row_id=f"canary {number}")
    rows = tuple(replace(row, labels=_learnt(row)) for row in canaries)
    return Planted(rows=rows, formats=tuple(formats), hidden=hidden)


def _learnt(row: Example) -> list[int]:
    """The secret is scored too: what no loss asks for is not learnt."""
    pairs = zip(row.tokens, row.labels, row.is_private, strict=True)
    return [
        token if is_private or label != NOT_SCORED else NOT_SCORED
        for token, label, is_private in pairs
    ]
