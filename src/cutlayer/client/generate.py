"""From prompts to replies: what the facade offers for generation, on one split model.

A token's way is in `session`, a turn of all streams in `decoder`; text is made in `chat`. It does
not load models or open connections (`client`).

Shapes: B = rows, V = vocabulary.
"""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from cutlayer.client.cached_row import Feed
from cutlayer.client.chat import Chat, TextPiece, eos_ids, require_chat_template
from cutlayer.client.decoder import Decoder
from cutlayer.client.drafting import DraftWorld
from cutlayer.client.engine import Engine, Meters
from cutlayer.client.row_text import RowText
from cutlayer.client.session import GenerationSession, SplitModel
from cutlayer.client.settings import GenerationSettings, SamplingSettings
from cutlayer.client.streams import NewToken, Request, Stream
from cutlayer.errors import ConfigError
from cutlayer.privacy.ledger import LedgerSummary

__all__ = ["Generator"]


class Generator:
    """One split model at one saved step, ready to generate."""

    def __init__(
        self, model: SplitModel, settings: GenerationSettings, context_length: int
    ) -> None:
        """
        Args:
            model: both parts, the far trunk and the gate between them.
            settings: how streams share.
            context_length: tokens of a row at most.
        """
        self._model = model
        self._settings = settings
        self._context_length = context_length

    def session(self) -> GenerationSession:
        """Rows with caches on all parts, for whoever wants the logits themselves."""
        return GenerationSession(self._model)

    def decoder(self, session: GenerationSession) -> Decoder:
        """Streams over the rows of a session."""
        return Decoder(session, self._settings, self._context_length, self._world)

    def engine(
        self, ledger: Callable[[], LedgerSummary], traffic: Callable[[], tuple[int, int]]
    ) -> Engine:
        """Streams for many callers, on a thread of its own.

        Args:
            ledger: totals of what has left.
            traffic: bytes sent and received.
        """
        session = self.session()
        guarantee = self._model.guarantee or self._model.boundary.guarantee
        meters = Meters(session=session, traffic=traffic, ledger=ledger, guarantee=guarantee)
        return Engine(self.decoder(session), meters)

    def chat(
        self, tokenizer: PreTrainedTokenizerBase, sampling: SamplingSettings, max_length: int
    ) -> Chat:
        """A conversation of at most `max_length` tokens.

        Raises:
            ConfigError: the model has no chat template.
        """
        require_chat_template(tokenizer)
        return Chat(self.decoder(self.session()), tokenizer, sampling, max_length)

    def score(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        """Logits [B, V] after the last token of each prompt, all rows in one call."""
        session = self.session()
        try:
            rows = [session.open_row(len(prompt)) for prompt in prompts]
            feeds = [Feed(row=row, tokens=p) for row, p in zip(rows, prompts, strict=True)]
            return torch.cat(session.step(feeds))
        finally:
            session.close()

    def ids(self, prompts: Sequence[Sequence[int]], sampling: SamplingSettings) -> list[list[int]]:
        """Continue rows of token ids; never stops at an end-of-text token."""
        requests = [
            Request(prompt=prompt, sampling=sampling, draw=row)
            for row, prompt in enumerate(prompts)
        ]
        return [stream.tokens for stream in self._finished(requests)]

    def texts(
        self,
        prompts: Sequence[str],
        sampling: SamplingSettings,
        tokenizer: PreTrainedTokenizerBase,
        on_piece: Callable[[TextPiece], None],
    ) -> list[str]:
        """Continue texts, all together; pieces are handed over as they become certain."""
        rows = [list(tokenizer(prompt)["input_ids"]) for prompt in prompts]
        if not all(rows):
            raise ConfigError("a prompt is empty; give it at least one character")
        replies = [_Reply(row, tokenizer, sampling, on_piece) for row in range(len(rows))]
        ends = eos_ids(tokenizer)
        self._finished(
            [
                Request(
                    prompt=tokens, sampling=sampling, eos_ids=ends, watch=reply.add, draw=reply.row
                )
                for tokens, reply in zip(rows, replies, strict=True)
            ]
        )
        return [reply.end() for reply in replies]

    def _finished(self, requests: Sequence[Request]) -> list[Stream]:
        decoder = self.decoder(self.session())
        try:
            streams = [decoder.add(request) for request in requests]
            decoder.finish(streams)
        finally:
            decoder.close()
        return streams

    def _world(self, session: GenerationSession, row: int, request: Request) -> DraftWorld:
        return DraftWorld(
            sampling=request.sampling,
            draw=request.draw,
            guess=partial(session.guess, row),
            forget=partial(session.forget_guesses, row),
            model=None if self._model.drafting is None else self._model.drafting.model,
        )


class _Reply:
    """One row's text as it comes."""

    def __init__(
        self,
        row: int,
        tokenizer: PreTrainedTokenizerBase,
        sampling: SamplingSettings,
        on_piece: Callable[[TextPiece], None],
    ) -> None:
        self.row = row
        self._text = RowText(tokenizer, sampling.stop)
        self._on_piece = on_piece
        self._pieces: list[str] = []

    def add(self, new: NewToken) -> bool:
        """Hand on the text that this token makes certain; whether a stop text has come."""
        self._hand_on(self._text.add(new.token))
        return self._text.is_stopped

    def end(self) -> str:
        """The whole reply."""
        self._hand_on(self._text.rest())
        return "".join(self._pieces)

    def _hand_on(self, piece: str) -> None:
        if piece:
            self._pieces.append(piece)
            self._on_piece(TextPiece(row=self.row, text=piece))
