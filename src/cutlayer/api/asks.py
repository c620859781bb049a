"""From a request's fields to rows of tokens and the way to continue them.

It does not run them (`replies`) nor know JSON (`bodies`).
"""

import secrets
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field

import jinja2

from cutlayer.api.bodies import Body, ChatBody, CompletionBody, Message
from cutlayer.api.engine import ServedModel
from cutlayer.api.errors import context_exceeded, invalid, unsupported
from cutlayer.client.settings import SamplingSettings

__all__ = ["Ask", "Asker"]

_LEAST_TOP_P = 1e-6
_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}


@dataclass(frozen=True, kw_only=True)
class Ask:
    """One request, ready to run: `n` replies to each prompt."""

    prompts: tuple[tuple[int, ...], ...] = field(repr=False)
    """Token ids."""
    sampling: SamplingSettings = field(repr=False)
    """How to choose tokens, how many, and where to stop."""
    n: int
    """Replies per prompt."""
    num_top: int | None
    """Log-probabilities wanted, as in `client.streams.Request`."""
    is_stream: bool
    """Whether tokens are sent as they come."""
    wants_usage: bool
    """Whether a stream ends with the counts."""
    echoes: tuple[str, ...] = field(default=(), repr=False)
    """Text before each reply, per prompt; empty repeats nothing."""

    @property
    def num_choices(self) -> int:
        """Replies in all, prompt by prompt."""
        return len(self.prompts) * self.n

    def prompt_of(self, choice: int) -> tuple[int, ...]:
        """The prompt of a reply."""
        return self.prompts[choice // self.n]


class Asker:
    """Reads requests with the model's tokenizer; several threads may do so."""

    def __init__(self, model: ServedModel) -> None:
        self._model = model
        # A fast tokenizer's encoder must not be used by two threads at once.
        self._lock = threading.Lock()

    def chat(self, body: ChatBody) -> Ask:
        """A conversation.

        Raises:
            ApiError: a role, a part or a length that cannot be.
        """
        messages = [_message(message, place) for place, message in enumerate(body.messages)]
        prompt = self._encode(self._render(messages), add_special_tokens=False)
        return self._ask(body, [prompt], "messages")

    def completion(self, body: CompletionBody) -> Ask:
        """Texts, or rows of token ids.

        Raises:
            ApiError: a prompt of another type, an empty or too long one.
        """
        prompts = [self._tokens(prompt) for prompt in _prompts(body.prompt)]
        if body.echo and body.logprobs is not None:
            raise unsupported("echo", "not together with logprobs")
        decode = self._model.tokenizer.decode
        echoes = tuple(str(decode(list(tokens))) for tokens in prompts) if body.echo else ()
        return self._ask(body, prompts, "prompt", echoes)

    def _ask(
        self,
        body: Body,
        prompts: Sequence[tuple[int, ...]],
        param: str,
        echoes: tuple[str, ...] = (),
    ) -> Ask:
        return Ask(
            prompts=tuple(prompts),
            sampling=self._sampling(body, prompts, param),
            n=body.n or 1,
            num_top=body.num_top,
            is_stream=bool(body.stream),
            wants_usage=body.stream_options is not None and bool(body.stream_options.include_usage),
            echoes=echoes,
        )

    def _sampling(
        self, body: Body, prompts: Sequence[tuple[int, ...]], param: str
    ) -> SamplingSettings:
        given: dict[str, object] = {
            "max_new_tokens": self._num_new(body, max(len(tokens) for tokens in prompts), param),
            "temperature": body.temperature,
            "top_p": None if body.top_p is None else max(body.top_p, _LEAST_TOP_P),
            "top_k": body.top_k,
            "min_p": body.min_p,
            "repetition_penalty": body.repetition_penalty,
            "stop": None if body.stop is None else tuple(body.stop),
            "seed": secrets.randbits(62) if body.seed is None else body.seed % 2**62,
        }
        kept = {name: value for name, value in given.items() if value is not None}
        return self._model.sampling.model_copy(update=kept)

    def _num_new(self, body: Body, num_prompt: int, param: str) -> int:
        context = self._model.context_length
        room = context - num_prompt
        wanted = body.num_new
        if wanted is None:
            wanted = max(1, min(self._model.sampling.max_new_tokens, room))
        if wanted > room:
            raise context_exceeded(context, num_prompt, wanted, param)
        return wanted

    def _render(self, messages: list[dict[str, str]]) -> str:
        tokenizer = self._model.tokenizer
        if tokenizer.chat_template is None:
            raise invalid("the model has no chat template; use /v1/completions", "messages")
        try:
            with self._lock:
                text = tokenizer.apply_chat_template(
                    messages, tokenize=False, add_generation_prompt=True
                )
        except (jinja2.TemplateError, ValueError, TypeError) as error:
            raise invalid(f"the chat template refuses the messages: {error}", "messages") from error
        return str(text)

    def _encode(self, text: str, *, add_special_tokens: bool) -> tuple[int, ...]:
        with self._lock:
            encoded = self._model.tokenizer(text, add_special_tokens=add_special_tokens)
        return tuple(encoded["input_ids"])

    def _tokens(self, prompt: str | list[int]) -> tuple[int, ...]:
        if isinstance(prompt, str):
            tokens = self._encode(prompt, add_special_tokens=True)
        else:
            tokens = tuple(prompt)
        size = len(self._model.tokenizer)
        if not tokens:
            raise invalid("a prompt is empty; give it at least one token", "prompt")
        if not all(0 <= token < size for token in tokens):
            raise invalid(f"a token id of the prompt is not in [0, {size})", "prompt")
        return tokens


def _message(message: Message, place: int) -> dict[str, str]:
    where = f"messages[{place}]"
    if message.role not in _ROLES:
        raise invalid(
            f"Invalid value for '{where}.role': {message.role[:40]!r}. Supported values are: "
            f"{', '.join(sorted(_ROLES))}.",
            f"{where}.role",
            "invalid_value",
        )
    for name in ("tool_calls", "function_call", "audio", "refusal"):
        if getattr(message, name):
            raise unsupported(f"{where}.{name}", "messages are text alone")
    return {"role": _ROLES[message.role], "content": _content(message.content, f"{where}.content")}


def _content(content: object, where: str) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, list) or not content:
        raise invalid(f"'{where}' must be text or a list of parts of type text", where)
    return "".join(_part(part, f"{where}[{place}]") for place, part in enumerate(content))


def _part(part: object, where: str) -> str:
    kind = part.get("type") if isinstance(part, dict) else None
    if isinstance(part, dict) and kind == "text" and isinstance(part.get("text"), str):
        return str(part["text"])
    raise unsupported(where, f"parts must have type text and a text, not type {str(kind)[:40]!r}")


def _prompts(prompt: object) -> list[str | list[int]]:
    """One text, one row of token ids, or a list of either."""
    if isinstance(prompt, str) or _is_ids(prompt):
        found: list[object] = [prompt]
    else:
        found = prompt if isinstance(prompt, list) else []
    if not found:
        raise invalid("prompt must be text, a list of texts, token ids or a list of such", "prompt")
    return [_row(item) for item in found]


def _row(item: object) -> str | list[int]:
    if isinstance(item, str):
        return item
    if isinstance(item, list) and _is_ids(item):
        return item
    raise invalid("every prompt of a list must be text, or a list of token ids", "prompt")


def _is_ids(value: object) -> bool:
    # A bool is an int to Python, and no token.
    return isinstance(value, list) and bool(value) and all(type(item) is int for item in value)
