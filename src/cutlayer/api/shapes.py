"""How answers look, in both APIs: chunks of a stream, whole replies, log-probabilities, usage.

It does not send them (`answers`).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from cutlayer.api.asks import Ask
from cutlayer.api.replies import End, Piece, ScoredToken
from cutlayer.api.token_bytes import TokenBytes
from cutlayer.client.streams import Finish

__all__ = ["ChatShape", "CompletionShape", "Reply", "Shape", "Table", "usage"]

Table = Mapping[str, object]
"""A JSON object."""


@dataclass(kw_only=True)
class Reply:
    """A whole reply, gathered from its pieces."""

    choice: int
    text: str = field(default="", repr=False)
    tokens: list[ScoredToken] = field(default_factory=list, repr=False)
    end: End | None = None

    def add(self, event: Piece | End) -> None:
        """Take the next event of this reply."""
        if isinstance(event, End):
            self.end = event
        else:
            self.text += event.text
            self.tokens += event.tokens


class Shape(Protocol):
    """One of the two APIs."""

    id_prefix: str
    whole_object: str
    chunk_object: str

    def opening(self, choice: int) -> Table | None:
        """The first chunk of a reply; None sends none."""
        ...

    def piece(self, piece: Piece) -> Table:
        """A chunk with text."""
        ...

    def ending(self, end: End) -> Table:
        """The last chunk of a reply."""
        ...

    def whole(self, reply: Reply) -> Table:
        """A reply that is not streamed."""
        ...


def finish_reason(end: End | None) -> str:
    """In that API's words."""
    return "length" if end is not None and end.stream.finish is Finish.LENGTH else "stop"


def usage(ask: Ask, ends: Sequence[End]) -> Table:
    """Counts of one request; a prompt counts once however many replies it gets."""
    num_prompt = sum(len(prompt) for prompt in ask.prompts)
    num_new = sum(len(end.stream.tokens) for end in ends)
    firsts = [end for end in ends if end.choice % ask.n == 0]
    return {
        "prompt_tokens": num_prompt,
        "completion_tokens": num_new,
        "total_tokens": num_prompt + num_new,
        "prompt_tokens_details": {"cached_tokens": sum(end.stream.num_cached for end in firsts)},
    }


class ChatShape:
    """/v1/chat/completions."""

    id_prefix = "chatcmpl-"
    whole_object = "chat.completion"
    chunk_object = "chat.completion.chunk"

    def __init__(self, ask: Ask, names: TokenBytes) -> None:
        self._is_scored = ask.num_top is not None
        self._names = names

    def opening(self, choice: int) -> Table | None:
        return self._chunk(choice, {"role": "assistant", "content": "", "refusal": None})

    def piece(self, piece: Piece) -> Table:
        return self._chunk(piece.choice, {"content": piece.text}, self._logprobs(piece.tokens))

    def ending(self, end: End) -> Table:
        return self._chunk(end.choice, {}, finish=finish_reason(end))

    def whole(self, reply: Reply) -> Table:
        return {
            "index": reply.choice,
            "message": {"role": "assistant", "content": reply.text, "refusal": None},
            "logprobs": self._logprobs(reply.tokens),
            "finish_reason": finish_reason(reply.end),
        }

    def _chunk(
        self, choice: int, delta: Table, logprobs: Table | None = None, finish: str | None = None
    ) -> Table:
        return {"index": choice, "delta": delta, "logprobs": logprobs, "finish_reason": finish}

    def _logprobs(self, tokens: Sequence[ScoredToken]) -> Table | None:
        if not self._is_scored:
            return None
        return {"content": [self._scored(token) for token in tokens], "refusal": None}

    def _scored(self, token: ScoredToken) -> Table:
        likeliest = [self._entry(other, logprob) for other, logprob in token.new.top]
        return {**self._entry(token.new.token, token.new.logprob), "top_logprobs": likeliest}

    def _entry(self, token: int, logprob: float | None) -> Table:
        content = self._names.of(token)
        text = content.decode(errors="replace")
        return {"token": text, "logprob": logprob, "bytes": list(content)}


class CompletionShape:
    """/v1/completions."""

    id_prefix = "cmpl-"
    whole_object = "text_completion"
    chunk_object = "text_completion"

    def __init__(self, ask: Ask, names: TokenBytes) -> None:
        self._ask = ask
        self._names = names

    def opening(self, choice: int) -> Table | None:
        text = self._echo(choice)
        return self._choice(choice, text) if text else None

    def piece(self, piece: Piece) -> Table:
        return self._choice(piece.choice, piece.text, piece.tokens)

    def ending(self, end: End) -> Table:
        return self._choice(end.choice, "", finish=finish_reason(end))

    def whole(self, reply: Reply) -> Table:
        text = self._echo(reply.choice) + reply.text
        return self._choice(reply.choice, text, reply.tokens, finish_reason(reply.end))

    def _echo(self, choice: int) -> str:
        return self._ask.echoes[choice // self._ask.n] if self._ask.echoes else ""

    def _choice(
        self,
        choice: int,
        text: str,
        tokens: Sequence[ScoredToken] = (),
        finish: str | None = None,
    ) -> Table:
        logprobs = self._logprobs(tokens)
        return {"index": choice, "text": text, "logprobs": logprobs, "finish_reason": finish}

    def _logprobs(self, tokens: Sequence[ScoredToken]) -> Table | None:
        if self._ask.num_top is None:
            return None
        return {
            "tokens": [self._names.text(token.new.token) for token in tokens],
            "token_logprobs": [token.new.logprob for token in tokens],
            "top_logprobs": [self._top(token) for token in tokens] if self._ask.num_top else None,
            "text_offset": [token.offset for token in tokens],
        }

    def _top(self, token: ScoredToken) -> Table:
        """The likeliest tokens, and the chosen one where it is not among them."""
        pairs = [*token.new.top, (token.new.token, token.new.logprob)]
        return {self._names.text(other): logprob for other, logprob in pairs}
