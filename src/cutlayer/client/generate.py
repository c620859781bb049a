"""Split generation at the data owner: one token, then a whole reply, for ragged rows.

Sampling is here; the server sees released vectors, lengths and positions. It does not load models
or open connections (`client`) nor keep a chat's text (`chat`).

Shapes: B = rows of a call, N = new tokens of all rows of a call, D = hidden size, V = vocabulary.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass

import torch
from torch import Tensor

from cutlayer.client.remote_trunk import RemoteTrunk
from cutlayer.client.sampling import RowSampler
from cutlayer.client.settings import SamplingSettings
from cutlayer.errors import ConfigError, ProtocolError, SessionLost
from cutlayer.model.kv_cache import RowCache
from cutlayer.model.partition import Head, Tail
from cutlayer.model.rows import pack
from cutlayer.privacy.boundary import Boundary, Released
from cutlayer.privacy.history import ReleasedHistory

__all__ = ["GeneratedToken", "GenerationSession", "SplitModel", "generate_tokens"]

_MAX_REPLAYS = 5


@dataclass(frozen=True, kw_only=True)
class SplitModel:
    """What generation needs: the client's parts, the far trunk and the gate between them."""

    head: Head
    tail: Tail
    trunk: RemoteTrunk
    boundary: Boundary
    run_id: str | None
    """Whose trunk adapter the server uses; None is the base model."""
    step: int | None
    """Which saved step of that run."""

    @property
    def version(self) -> str:
        """Identifier of the weights that make the released vectors."""
        return "base" if self.step is None else f"step{self.step}"


@dataclass(frozen=True, kw_only=True)
class GeneratedToken:
    """One new token of one row."""

    row: int
    token: int


class GenerationSession:
    """Some rows with a KV cache on each part; survives a server that loses its own."""

    def __init__(self, model: SplitModel, max_lengths: Sequence[int]) -> None:
        """Reserve room for rows of at most `max_lengths` tokens.

        Raises:
            CacheFull: the server has no room; ask again later or for less.
        """
        self._model = model
        self._max_lengths = tuple(max_lengths)
        self._history = ReleasedHistory(len(self._max_lengths))
        self._head_caches = _caches(model.head, self._max_lengths)
        self._tail_caches = _caches(model.tail, self._max_lengths)
        self._session_id = self._open()
        self.num_replays = 0

    def length(self, row: int) -> int:
        """Tokens of a row that are cached."""
        return self._tail_caches[row].length

    @torch.inference_mode()
    def step(self, new_tokens: Sequence[Sequence[int]], rows: Sequence[int]) -> Tensor:
        """Feed new tokens of some rows; logits [B, V] after the last token of each.

        Args:
            new_tokens: per row its next tokens, at least one: a prompt or the token just chosen.
            rows: which rows of the session, ascending.

        Raises:
            ConfigError: a row would grow past its limit.
        """
        self._check_room(new_tokens, rows)
        # Rows are named alike in every session: an equal prompt is then a replay, not a new draw.
        starts = [self._head_caches[row].length for row in rows]
        packed = pack(new_tokens, starts)
        h_ND = self._model.head(packed, [self._head_caches[row] for row in rows])
        _, released = self._model.boundary.release(
            h_ND, packed, [f"row{row}" for row in rows], self._model.version
        )
        self._history.record(released, rows)
        y_ND = self._decode(released, rows)
        layout = packed.without_tokens()
        last_B = torch.tensor(packed.offsets[1:]) - 1
        caches = [self._tail_caches[row] for row in rows]
        logits_BV: Tensor = self._model.tail(y_ND, layout, caches, select_N=last_B)
        if not bool(torch.isfinite(logits_BV).all()):
            raise ProtocolError("the trunk's output gives logits that are not finite")
        return logits_BV

    def truncate(self, row: int, length: int) -> None:
        """Forget the tokens of a row from `length` on; the server follows at the next step."""
        self._history.truncate(row, length)
        self._head_caches[row].truncate(length)
        self._tail_caches[row].truncate(length)

    def close(self) -> None:
        """Give the server's cache back."""
        self._model.trunk.close_session(self._session_id)

    def _open(self) -> str:
        model = self._model
        return model.trunk.open_session(self._max_lengths, model.run_id, model.step)

    def _decode(self, released: Released, rows: Sequence[int]) -> Tensor:
        for attempt in range(_MAX_REPLAYS):
            with suppress(SessionLost):
                if attempt:
                    self._reopen(released, rows)
                return self._model.trunk.decode(released, self._session_id, rows)
        raise SessionLost(f"the server lost this session {_MAX_REPLAYS} times in a row; try later")

    def _reopen(self, released: Released, rows: Sequence[int]) -> None:
        """Open a new session and send the very bytes that were released before this call."""
        self._session_id = self._open()
        self.num_replays += 1
        before = dict(zip(rows, released.rows.starts, strict=True))
        for row in range(len(self._max_lengths)):
            length = before.get(row, self._history.length(row))
            if length:
                past = self._history.replay([row])
                past = past if past.rows.num_tokens == length else past.first(length)
                self._model.trunk.decode(past, self._session_id, [row])

    def _check_room(self, new_tokens: Sequence[Sequence[int]], rows: Sequence[int]) -> None:
        for tokens, row in zip(new_tokens, rows, strict=True):
            wanted = self._head_caches[row].length + len(tokens)
            if wanted > self._max_lengths[row]:
                raise ConfigError(
                    f"row {row} would have {wanted} tokens, the session was opened for "
                    f"{self._max_lengths[row]}; shorten the prompt or max_new_tokens"
                )


def generate_tokens(
    session: GenerationSession,
    prompts: Sequence[Sequence[int]],
    sampling: SamplingSettings,
    eos_ids: frozenset[int],
    is_stopped: Callable[[int], bool] = lambda row: False,
    seen: Sequence[Sequence[int]] | None = None,
) -> Iterator[GeneratedToken]:
    """Tokens of all rows as they come, row by row within a step; one round trip per step.

    Args:
        session: opened for at least prompt + new tokens of every row.
        prompts: B rows of token ids, appended to what the session has cached.
        sampling: how to choose, and how many tokens at most.
        eos_ids: tokens that end a row; they are not yielded.
        is_stopped: asked after each token whether its row has met a stop text.
        seen: tokens of each row before its prompt, for the repetition penalty.
    """
    tokens = [list(row) for row in (seen or [[] for _ in prompts])]
    for known, prompt in zip(tokens, prompts, strict=True):
        known.extend(prompt)
    samplers = [RowSampler(sampling, row) for row in range(len(prompts))]
    active = list(range(len(prompts)))
    feed = {row: list(prompts[row]) for row in active}
    for number in range(sampling.max_new_tokens):
        logits_BV = session.step([feed[row] for row in active], active)
        going_on = []
        for logits_V, row in zip(logits_BV, active, strict=True):
            token = samplers[row].next_token(logits_V, tokens[row])
            if token in eos_ids:
                continue
            tokens[row].append(token)
            yield GeneratedToken(row=row, token=token)
            if not is_stopped(row):
                going_on.append(row)
                feed[row] = [token]
        active = going_on
        if not active or number + 1 == sampling.max_new_tokens:
            return


def _caches(part: Head | Tail, max_lengths: Sequence[int]) -> list[RowCache]:
    return [RowCache(len(part.block_range), length) for length in max_lengths]
