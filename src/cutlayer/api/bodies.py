"""Request bodies: which fields there are, of which type, and what is refused.

It does not know a tokenizer (`asks`). Unknown fields are errors, as at OpenAI: a misspelt
`max_token` must not silently cost money or budget.
"""

import difflib
from collections.abc import Mapping
from typing import Annotated, TypeVar

import msgspec
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from cutlayer.api.errors import ApiError, invalid, unsupported

__all__ = ["Body", "ChatBody", "CompletionBody", "Message", "parse_body"]

T = TypeVar("T", bound="Body")
_MAX_CHOICES = 128
_MAX_STOPS = 16
_MAX_STOP_CHARS = 512
"""Every token is compared with all beginnings of a stop text."""
_MAX_TOP = 20
_IGNORED = frozenset(
    {
        *("metadata", "parallel_tool_calls", "prompt_cache_key", "prompt_cache_options"),
        *("prompt_cache_retention", "safety_identifier", "service_tier", "store", "user"),
    }
)
"""Fields that would change no token here; nothing is stored, whatever `store` says."""
_NO_TOOLS = "this endpoint answers with text alone"
_UNSUPPORTED: Mapping[str, tuple[tuple[object, ...], str]] = {
    "audio": ((), _NO_TOOLS),
    "best_of": ((1,), "set n and choose among the replies"),
    "frequency_penalty": ((0,), "repetition_penalty is"),
    "function_call": (("none",), _NO_TOOLS),
    "functions": (([],), _NO_TOOLS),
    "logit_bias": (({},), "there is nothing alike"),
    "modalities": ((["text"],), _NO_TOOLS),
    "moderation": ((), "nothing but vectors leaves this machine"),
    "prediction": ((), "guesses are made from the conversation itself"),
    "presence_penalty": ((0,), "repetition_penalty is"),
    "reasoning_effort": (("none",), "there is nothing alike"),
    "response_format": (({"type": "text"},), "replies are free text"),
    "suffix": (("",), "the model continues texts, it does not fill gaps"),
    "tool_choice": (("none", "auto"), _NO_TOOLS),
    "tools": (([],), _NO_TOOLS),
    "verbosity": (("medium",), "there is nothing alike"),
    "web_search_options": ((), "nothing but vectors leaves this machine"),
}
"""Known fields: values that ask for nothing and are accepted, and what to say to all others."""


def _listed(stop: object) -> object:
    return [stop] if isinstance(stop, str) else stop


_Stop = Annotated[str, Field(min_length=1, max_length=_MAX_STOP_CHARS)]


class _Part(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", use_attribute_docstrings=True)


class StreamOptions(_Part):
    """What a stream tells besides text."""

    include_usage: bool | None = None
    """A last chunk with the counts."""
    include_obfuscation: bool | None = None
    """Ignored: the link to this endpoint is the owner's own."""


class Message(_Part):
    """One turn; content parts are taken apart in `asks`."""

    role: str
    """system, developer, user or assistant."""
    content: object = None
    """Text, or a list of parts of type text."""
    name: str | None = None
    """Ignored: chat templates know no names."""
    refusal: object = None
    """Of an earlier reply; None here."""
    annotations: object = None
    """Of an earlier reply, ignored."""
    audio: object = None
    """Of an earlier reply; refused unless None."""
    tool_calls: object = None
    """Refused unless None or empty."""
    function_call: object = None
    """Refused unless None."""


class Body(_Part):
    """Fields that both APIs have."""

    model: str
    """Id of the model."""
    max_tokens: int | None = Field(default=None, ge=1)
    """Tokens of a reply at most."""
    temperature: float | None = Field(default=None, ge=0, le=2)
    """0 is greedy."""
    top_p: float | None = Field(default=None, ge=0, le=1)
    """Keep the fewest tokens whose probabilities reach p."""
    n: int | None = Field(default=None, ge=1, le=_MAX_CHOICES)
    """Replies per prompt."""
    seed: int | None = None
    """Equal requests with an equal seed get equal replies."""
    stop: Annotated[list[_Stop] | None, BeforeValidator(_listed)] = Field(
        default=None, max_length=_MAX_STOPS
    )
    """Texts that end a reply."""
    stream: bool | None = None
    """Send tokens as they come."""
    stream_options: StreamOptions | None = None
    """Only with `stream`."""
    top_k: int | None = Field(default=None, ge=1)
    """Not of that API: keep the k most likely tokens."""
    min_p: float | None = Field(default=None, ge=0, le=1)
    """Not of that API: keep tokens of at least p times the highest probability."""
    repetition_penalty: float | None = Field(default=None, ge=0.01, le=100)
    """Not of that API: divide or multiply logits of tokens seen before. Beyond these bounds they
    overflow, and a distribution of NaN would end other requests' replies too."""

    @model_validator(mode="after")
    def _options_need_a_stream(self) -> "Body":
        if self.stream_options is not None and not self.stream:
            raise invalid("stream_options is allowed only with stream=true", "stream_options")
        return self

    @property
    def num_new(self) -> int | None:
        """Tokens of a reply at most, where the request says so."""
        return self.max_tokens

    @property
    def num_top(self) -> int | None:
        """Log-probabilities wanted: None for none, else how many of the likeliest tokens."""
        return None


class ChatBody(Body):
    """POST /v1/chat/completions."""

    # Or a million wrong messages would be a million errors, and nothing answered meanwhile.
    messages: list[Message] = Field(min_length=1, fail_fast=True)
    """The conversation so far."""
    max_completion_tokens: int | None = Field(default=None, ge=1)
    """The newer name of max_tokens; it wins."""
    logprobs: bool | None = None
    """Log-probability of each token."""
    top_logprobs: int | None = Field(default=None, ge=0, le=_MAX_TOP)
    """And of so many of the likeliest; only with `logprobs`."""

    @model_validator(mode="after")
    def _top_needs_logprobs(self) -> "ChatBody":
        if self.top_logprobs is not None and not self.logprobs:
            raise invalid("top_logprobs is allowed only with logprobs=true", "top_logprobs")
        return self

    @property
    def num_new(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens

    @property
    def num_top(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None


class CompletionBody(Body):
    """POST /v1/completions."""

    prompt: object
    """Text, token ids, or a list of either."""
    logprobs: int | None = Field(default=None, ge=0, le=_MAX_TOP)
    """Log-probability of each token, and of so many of the likeliest."""
    echo: bool | None = None
    """Repeat the prompt before the reply."""

    @property
    def num_top(self) -> int | None:
        return self.logprobs


def parse_body(kind: type[T], content: bytes) -> T:
    """The request's fields.

    Raises:
        ApiError: no JSON object, a field of the wrong type or range, unknown or not supported.
    """
    try:
        table = msgspec.json.decode(content)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise invalid(f"the body is not valid JSON: {error}") from error
    if not isinstance(table, dict):
        raise invalid("the body must be a JSON object")
    known = {name: value for name, value in table.items() if not _asks_nothing(name, value)}
    try:
        return kind.model_validate(known)
    except ValidationError as error:
        raise _explain(kind, dict(error.errors(include_url=False)[0])) from error


def _asks_nothing(name: str, value: object) -> bool:
    if name in _IGNORED:
        return True
    if name not in _UNSUPPORTED:
        return False
    harmless, why = _UNSUPPORTED[name]
    if value is not None and value not in harmless:
        raise unsupported(name, why)
    return True


def _explain(kind: type[Body], item: Mapping[str, object]) -> ApiError:
    location = item["loc"]
    assert isinstance(location, tuple)
    param = _path(location)
    if item["type"] == "missing":
        message = f"Missing required parameter: '{param}'."
        return invalid(message, param, "missing_required_parameter")
    if item["type"] != "extra_forbidden":
        return invalid(f"Invalid value for '{param}': {item['msg']}.", param, "invalid_value")
    near = difflib.get_close_matches(str(location[-1]), list(kind.model_fields), n=1)
    hint = f" Did you mean '{near[0]}'?" if near and len(location) == 1 else ""
    return invalid(
        f"Unrecognized request argument supplied: {param}.{hint}", param, "unknown_parameter"
    )


def _path(location: tuple[object, ...]) -> str:
    """messages[0].content, as that API writes it."""
    parts = [f"[{part}]" if isinstance(part, int) else f".{part}" for part in location]
    return "".join(parts).lstrip(".")
