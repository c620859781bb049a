"""Scores a task file through the split model: choices by log-likelihood, then replies.

It wires the room together: reading is in `tasks`, tokens in `rows`, batching in `passes`, scores in
`text_metrics`, sums in `report`.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from cutlayer.client.client import Client
from cutlayer.errors import DataError
from cutlayer.evaluation.choices import ChoiceScores
from cutlayer.evaluation.passes import PassLimits, run_passes
from cutlayer.evaluation.replies import Reply, ReplyMaker
from cutlayer.evaluation.report import Cost, Evaluation, Outcome, choice_outcome
from cutlayer.evaluation.rows import ChoiceRow, GenerateRow, RowMaker, TooLong
from cutlayer.evaluation.tasks import Item
from cutlayer.evaluation.text_metrics import METRICS, TextMetric

__all__ = ["EvaluationOptions", "evaluate"]


@dataclass(frozen=True, kw_only=True)
class EvaluationOptions:
    """How a task file is scored; how a reply is sampled is in the client's settings."""

    max_batch_tokens: int = 1024
    """Tokens of several choice items that go in one call of the trunk at most."""
    skips_long: bool = False
    """Leave items out that are longer than the model's context, instead of refusing the file."""


def evaluate(
    client: Client,
    items: Sequence[Item],
    options: EvaluationOptions,
    on_done: Callable[[], None] = lambda: None,
) -> Evaluation:
    """Score every item.

    Args:
        client: open; its best saved step is scored, or the base model where nothing was trained.
        items: what `read_items` gave.
        options: batching, and what to do with what is too long.
        on_done: told after each item, also on another thread.

    Raises:
        DataError: nothing to score, an item without tokens, or one longer than the context.
        ConfigError: a metric needs a package that is not installed.
        BudgetExceeded: the privacy budget forbids the next release; nothing of it was sent.
    """
    rows, skipped = _rows(client, items, options)
    # Before any work: a metric may lack its package.
    metrics = _metrics(rows)
    before, began_s = _Counters(client), time.monotonic()
    scores = _score_choices(client, [r for r in rows if isinstance(r, ChoiceRow)], options, on_done)
    asked = [row for row in rows if isinstance(row, GenerateRow)]
    replies = _replies(client, asked, on_done)
    seconds, after = time.monotonic() - began_s, _Counters(client)
    outcomes = {
        **{id(score.row): _choice(score) for score in scores},
        **{
            id(row): _generation(row, reply, metrics)
            for row, reply in zip(asked, replies, strict=True)
        },
    }
    num_new = sum(reply.num_tokens for reply in replies)
    num_fed = sum(score.num_fed for score in scores) + sum(len(row.prompt) for row in asked)
    return Evaluation(
        outcomes=[outcomes[id(row)] for row in rows],
        skipped=skipped,
        cost=after.since(before, num_fed + num_new, num_new, seconds),
        guarantee=client.guarantee,
    )


class _Counters:
    """What had left at a moment."""

    def __init__(self, client: Client) -> None:
        summary = client.ledger
        self._bytes = (client.trunk.bytes_sent, client.trunk.bytes_received)
        self._vectors = (summary.num_vectors.get("generation", 0), summary.num_replayed_vectors)

    def since(
        self, before: "_Counters", num_tokens: int, num_new_tokens: int, seconds: float
    ) -> Cost:
        return Cost(
            num_tokens=num_tokens,
            num_new_tokens=num_new_tokens,
            seconds=seconds,
            bytes_up=self._bytes[0] - before._bytes[0],
            bytes_down=self._bytes[1] - before._bytes[1],
            num_vectors_released=self._vectors[0] - before._vectors[0],
            num_vectors_replayed=self._vectors[1] - before._vectors[1],
        )


def _rows(
    client: Client, items: Sequence[Item], options: EvaluationOptions
) -> tuple[list[ChoiceRow | GenerateRow], list[TooLong]]:
    maker = RowMaker(client.tokenizer, client.context_length)
    made = [maker.make(item) for item in items]
    skipped = [row for row in made if isinstance(row, TooLong)]
    if skipped and not options.skips_long:
        raise DataError(
            f"{skipped[0]}, prompt and answer together ({len(skipped)} such items); shorten them, "
            "or leave them out with --skip-long"
        )
    rows = [row for row in made if not isinstance(row, TooLong)]
    if not rows:
        raise DataError(f"no item to score is left of {len(items)}; give at least one that fits")
    return rows, skipped


def _metrics(rows: Sequence[ChoiceRow | GenerateRow]) -> dict[str, TextMetric]:
    items = (row.item for row in rows if isinstance(row, GenerateRow))
    return {name: METRICS.make(name) for name in {name for item in items for name in item.metrics}}


def _score_choices(
    client: Client,
    rows: Sequence[ChoiceRow],
    options: EvaluationOptions,
    on_done: Callable[[], None],
) -> list[ChoiceScores]:
    scores = [ChoiceScores(row) for row in rows]
    if not scores:
        return scores
    generation = client.settings.generation
    limits = PassLimits(
        max_tokens=options.max_batch_tokens,
        max_rows=generation.max_streams,
        piece_tokens=generation.prefill_tokens,
    )
    session = client.session()
    try:
        run_passes(session, [score.work() for score in scores], limits, on_done)
    finally:
        session.close()
    return scores


def _replies(
    client: Client, rows: Sequence[GenerateRow], on_done: Callable[[], None]
) -> list[Reply]:
    if not rows:
        return []
    engine = client.engine()
    try:
        maker = ReplyMaker(engine, client.tokenizer, client.settings.sampling)
        return maker.replies(rows, on_done)
    finally:
        engine.close()


def _choice(score: ChoiceScores) -> Outcome:
    item = score.row.item
    return choice_outcome(item.where, score.log_likelihoods, item.choices, item.answer)


def _generation(row: GenerateRow, reply: Reply, metrics: dict[str, TextMetric]) -> Outcome:
    item = row.item
    return Outcome(
        where=item.where,
        scores={name: metrics[name](reply.text, item.answers) for name in item.metrics},
        prediction={"kind": "generate", "reply": reply.text},
    )
