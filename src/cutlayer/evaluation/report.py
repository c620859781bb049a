"""What an evaluation found: one outcome per item, a summary per metric, and what it cost.

It does not run anything. Replies are the owner's text: they stand in the predictions alone.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from cutlayer.evaluation.rows import TooLong
from cutlayer.evaluation.statistics import Summary, summarise

__all__ = ["Cost", "Evaluation", "Outcome", "choice_outcome", "predictions", "summaries"]


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """One item's scores and the line about it in the predictions."""

    where: str
    """`file:line`."""
    scores: Mapping[str, float]
    """Per metric 0 to 1."""
    prediction: Mapping[str, object] = field(repr=False)
    """What was predicted, in JSON values."""


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What scoring took."""

    num_tokens: int
    """Tokens of prompts, choices and replies that went through the model."""
    num_new_tokens: int
    """Those of them that it wrote."""
    seconds: float
    bytes_up: int
    bytes_down: int
    num_vectors_released: int
    """Vectors that left for the first time."""
    num_vectors_replayed: int
    """Vectors that had left before, byte for byte."""

    def values(self) -> dict[str, float]:
        """JSON form."""
        return {
            "num_tokens": self.num_tokens,
            "num_new_tokens": self.num_new_tokens,
            "seconds": round(self.seconds, 3),
            "tokens_per_s": round(self.num_tokens / max(self.seconds, 1e-9), 2),
            "bytes_up": self.bytes_up,
            "bytes_down": self.bytes_down,
            "num_vectors_released": self.num_vectors_released,
            "num_vectors_replayed": self.num_vectors_replayed,
        }


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """The whole result."""

    outcomes: Sequence[Outcome] = field(repr=False)
    """In the order of the file."""
    skipped: Sequence[TooLong]
    cost: Cost
    guarantee: str
    """What the noise promises."""

    def values(self) -> dict[str, object]:
        """JSON form, without replies."""
        metrics = summaries(self.outcomes)
        return {
            "metrics": {name: summary.values() for name, summary in metrics.items()},
            "num_items": len(self.outcomes),
            "num_skipped": len(self.skipped),
            "skipped": [str(item) for item in self.skipped],
            **self.cost.values(),
            "guarantee": self.guarantee,
        }


def choice_outcome(
    where: str, log_likelihoods: Sequence[float], choices: Sequence[str], answer: int
) -> Outcome:
    """Whether the likeliest choice is the right one; the first one of equals.

    Args:
        where: `file:line`.
        log_likelihoods: per choice, in nats.
        choices: their texts; the normalised form divides by their characters.
        answer: place of the right choice.

    Source: Gao et al., lm-evaluation-harness: `acc` and `acc_norm`.
    """
    per_character = [s / len(text) for s, text in zip(log_likelihoods, choices, strict=True)]
    chosen = log_likelihoods.index(max(log_likelihoods))
    chosen_normalised = per_character.index(max(per_character))
    return Outcome(
        where=where,
        scores={
            "accuracy": float(chosen == answer),
            "accuracy_normalised": float(chosen_normalised == answer),
        },
        prediction={
            "kind": "choice",
            "log_likelihoods": list(log_likelihoods),
            "choice": chosen,
            "choice_normalised": chosen_normalised,
            "answer": answer,
        },
    )


def summaries(outcomes: Sequence[Outcome]) -> dict[str, Summary]:
    """Per metric the mean over the items that have it, by name."""
    names = sorted({name for outcome in outcomes for name in outcome.scores})
    return {
        name: summarise([o.scores[name] for o in outcomes if name in o.scores]) for name in names
    }


def predictions(outcomes: Sequence[Outcome]) -> Iterator[bytes]:
    """JSON lines, one per item, in the order of the file."""
    for outcome in outcomes:
        line = {"where": outcome.where, **outcome.prediction, "scores": dict(outcome.scores)}
        yield json.dumps(line, ensure_ascii=False).encode() + b"\n"
