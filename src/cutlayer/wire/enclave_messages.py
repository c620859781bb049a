"""The headers between an owner and an attested enclave that holds all later blocks; docs/wire.md.

It does not decide anything (`enclave`). These are the only headers that may say more of a row than
its length: which of its places are scored and, where the owner's settings send them, the labels
there and the summed loss. An ordinary server refuses these kinds, and a client sends no label but
to evidence that its policy accepts.

Everything else of a run is as towards a trunk server: OPEN_RUN, COMMIT, PULL_ADAPTER, sessions.
"""

from collections.abc import Mapping

import msgspec

from cutlayer.wire.header import Header, Step
from cutlayer.wire.kinds import Kind

__all__ = [
    "HEADERS",
    "AskRows",
    "DecodeLogits",
    "LearnLogits",
    "Logits",
    "LogitsLearnt",
    "PutRows",
    "RowsMissing",
    "RowsPut",
    "RowsScored",
    "ScoreRows",
]


class AskRows(Header, frozen=True, kw_only=True):
    """Which of these rows have to be sent."""

    row_set: str
    """The owner's name for its rows: its own run, and in which form they were sent."""
    front: str
    """Digest (hex) of the weights that made the activations."""
    row_ids: list[int]


class RowsMissing(Header, frozen=True, kw_only=True):
    """Those that are not here."""

    row_ids: list[int]


class PutRows(Header, frozen=True, kw_only=True):
    """Front activations of some rows, kept until the run idles; tensors: `h`."""

    row_set: str
    front: str
    row_ids: list[int]
    lengths: list[int]
    places: list[list[int]]
    """Per row its places, from 0 and ascending, that predict a scored token."""
    targets: list[list[int]] = msgspec.field(default_factory=list)
    """Per row the token that each of its places predicts; empty where labels stay at the owner."""


class RowsPut(Header, frozen=True, kw_only=True):
    """They are here."""

    held_bytes: int
    """Of this owner, all its rows together."""


class ScoreRows(Header, frozen=True, kw_only=True):
    """Compute rows that are here: a micro-batch of the open step, or an evaluation."""

    run_id: str
    step: int
    """The step being computed, from 1; of an evaluation the last finished one."""
    micro: int
    """Micro-batch of the step, from 0."""
    row_set: str
    front: str
    row_ids: list[int]
    is_last: bool = False
    """The last micro-batch of the step."""
    commit: Step | None = None
    """Finish the step before, then run this one."""
    is_evaluation: bool = False
    """Nothing is learnt from it."""
    has_loss_inside: bool = False
    """Compute the loss with the labels that came with the rows and learn from it at once; no
    LEARN_LOGITS will come."""


class RowsScored(Header, frozen=True, kw_only=True):
    """Tensors: `logits` [S, V] of the rows' scored places, unless the loss was computed inside."""

    step: int
    micro: int
    loss_sum: float | None = None
    """Of the summed loss, to the owner of the labels alone."""
    sq_norm: float | None = None
    """As in LOGITS_LEARNT, where the loss was computed inside."""


class LearnLogits(Header, frozen=True, kw_only=True):
    """Gradient of the summed loss at the logits of a micro-batch; tensors: `grad` [S, V].

    A micro-batch without scored places has no tensor.
    """

    run_id: str
    step: int
    micro: int
    is_last: bool


class LogitsLearnt(Header, frozen=True, kw_only=True):
    """The micro-batch counts."""

    step: int
    micro: int
    sq_norm: float | None = None
    """After the last one: squared L2 norm of the adapter's gradient of the summed loss."""


class DecodeLogits(Header, frozen=True, kw_only=True):
    """Vectors of some rows of a session; tensors: `h`. The first five fields are DECODE's."""

    session_id: str
    rows: list[int]
    lengths: list[int]
    positions: list[int]
    max_lengths: list[int]
    num_logits: list[int]
    """Per row: after how many of its last new tokens logits are wanted; 0 wants none."""


class Logits(Header, frozen=True, kw_only=True):
    """Tensors: `logits` [S, V], in the order of the rows; none where none were wanted."""


HEADERS: Mapping[Kind, type[Header]] = {
    Kind.ASK_ROWS: AskRows,
    Kind.ROWS_MISSING: RowsMissing,
    Kind.PUT_ROWS: PutRows,
    Kind.ROWS_PUT: RowsPut,
    Kind.SCORE_ROWS: ScoreRows,
    Kind.ROWS_SCORED: RowsScored,
    Kind.LEARN_LOGITS: LearnLogits,
    Kind.LOGITS_LEARNT: LogitsLearnt,
    Kind.DECODE_LOGITS: DecodeLogits,
    Kind.LOGITS: Logits,
}
