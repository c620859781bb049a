"""Replies to generate items, all of them through one engine.

It does not choose tokens or batch (`client.engine`) nor score (`text_metrics`).
"""

import queue
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from transformers import PreTrainedTokenizerBase

from cutlayer.client.chat import eos_ids
from cutlayer.client.engine import Engine
from cutlayer.client.row_text import RowText
from cutlayer.client.settings import SamplingSettings
from cutlayer.client.streams import NewToken, Request, Stream
from cutlayer.errors import CutlayerError
from cutlayer.evaluation.rows import GenerateRow

__all__ = ["Reply", "ReplyMaker"]


@dataclass(frozen=True, kw_only=True)
class Reply:
    """What the model wrote after one prompt."""

    text: str = field(repr=False)
    """Without its stop text."""
    num_tokens: int
    """Tokens that it wrote."""


class ReplyMaker:
    """Asks an engine for replies, many at once."""

    def __init__(
        self, engine: Engine, tokenizer: PreTrainedTokenizerBase, sampling: SamplingSettings
    ) -> None:
        """
        Args:
            engine: started; it decides how many streams go together.
            tokenizer: tokens to text.
            sampling: how to choose; length and stop texts are each item's own.
        """
        self._engine = engine
        self._tokenizer = tokenizer
        self._sampling = sampling
        self._eos_ids = eos_ids(tokenizer)

    def replies(
        self, rows: Sequence[GenerateRow], on_done: Callable[[], None] = lambda: None
    ) -> list[Reply]:
        """One reply per row.

        Raises:
            CutlayerError: what the first failed stream failed with; the others are cancelled.
        """
        ended: queue.SimpleQueue[CutlayerError | None] = queue.SimpleQueue()
        texts = [_Text(self._tokenizer, row.item.stop) for row in rows]
        streams = [
            self._engine.submit(
                self._request(row, text), on_end=lambda stream, error: ended.put(error)
            )
            for row, text in zip(rows, texts, strict=True)
        ]
        self._await(streams, ended, on_done)
        return [
            Reply(text=text.whole(), num_tokens=len(stream.tokens))
            for text, stream in zip(texts, streams, strict=True)
        ]

    def _request(self, row: GenerateRow, text: "_Text") -> Request:
        length, stop = row.item.max_new_tokens, row.item.stop
        sampling = self._sampling.model_copy(update={"max_new_tokens": length, "stop": stop})
        return Request(
            prompt=row.prompt, sampling=sampling, eos_ids=self._eos_ids, watch=text.watch
        )

    def _await(
        self,
        streams: Sequence[Stream],
        ended: "queue.SimpleQueue[CutlayerError | None]",
        on_done: Callable[[], None],
    ) -> None:
        try:
            for _ in streams:
                error = ended.get()
                if error is not None:
                    raise error
                on_done()
        except BaseException:
            for stream in streams:
                self._engine.cancel(stream)
            raise


class _Text:
    """A reply's text so far."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop: Sequence[str]) -> None:
        self._row = RowText(tokenizer, stop)
        self._pieces: list[str] = []

    def watch(self, new: NewToken) -> bool:
        self._pieces.append(self._row.add(new.token))
        return self._row.is_stopped

    def whole(self) -> str:
        return "".join([*self._pieces, self._row.rest()])
