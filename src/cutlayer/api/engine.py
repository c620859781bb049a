"""What the endpoint needs from behind it: an engine of token streams, and the model's own facts.

It computes nothing; `client.engine` does.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from transformers import PreTrainedTokenizerBase

from cutlayer.client.settings import SamplingSettings
from cutlayer.client.streams import Request, Stream
from cutlayer.errors import CutlayerError

__all__ = ["EngineStatus", "ServedModel", "TokenEngine"]


class EngineStatus(Protocol):
    """Counts since the engine's start."""

    @property
    def num_streams(self) -> int:
        """Streams that decode."""
        ...

    @property
    def num_waiting(self) -> int:
        """Streams that wait for room."""
        ...

    @property
    def num_tokens(self) -> int:
        """Tokens delivered."""
        ...

    @property
    def tokens_per_s(self) -> float:
        """Of the last seconds, all streams together."""
        ...

    @property
    def num_round_trips(self) -> int:
        """Calls of the trunk."""
        ...

    @property
    def num_round_trips_saved(self) -> int:
        """Calls that guesses and joint streams made unnecessary."""
        ...

    @property
    def bytes_up(self) -> int:
        """Sent to the trunk server."""
        ...

    @property
    def bytes_down(self) -> int:
        """Received from it."""
        ...

    @property
    def num_sessions_replayed(self) -> int:
        """Sessions that the server lost and got again."""
        ...

    @property
    def guarantee(self) -> str:
        """What the noise promises."""
        ...

    @property
    def num_vectors_released(self) -> int:
        """Vectors that left for the first time, rejected guesses included."""
        ...

    @property
    def num_vectors_replayed(self) -> int:
        """Vectors that were sent again, unchanged."""
        ...


class TokenEngine(Protocol):
    """Many streams over one link; `watch` and `on_end` are called on its thread."""

    def submit(
        self, request: Request, on_end: Callable[[Stream, CutlayerError | None], None]
    ) -> Stream:
        """Begin or queue a stream; `on_end` is called once."""
        ...

    def cancel(self, stream: Stream) -> None:
        """End a stream that nobody waits for; nothing more of it is released."""
        ...

    def status(self) -> EngineStatus:
        """Counts as of now."""
        ...


@dataclass(frozen=True, kw_only=True)
class ServedModel:
    """The one model of an endpoint."""

    name: str
    """Its id in requests."""
    tokenizer: PreTrainedTokenizerBase = field(repr=False)
    """Text to tokens and back."""
    context_length: int
    """Tokens of prompt and reply together at most."""
    sampling: SamplingSettings
    """What holds where a request says nothing."""
