"""`cutlayer generate` and `cutlayer chat`: text in, text out, while it is made.

Making it is in `client`; sampling is set by `--set sampling.KEY=VALUE`.
"""

import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cutlayer.cli.options import (
    ConfigOption,
    JsonOption,
    PromptArgument,
    PromptFileOption,
    SetOption,
)
from cutlayer.cli.output import Output
from cutlayer.cli.results import print_replies, reply_pairs
from cutlayer.errors import ConfigError

if TYPE_CHECKING:
    from cutlayer.client.client import Client

__all__ = ["chat", "generate", "read_prompts"]

_ENDS = frozenset({"/exit", "/quit"})
LengthOption = Annotated[
    int | None, typer.Option("--max-length", metavar="TOKENS", help="Room for the conversation.")
]


def generate(
    config: ConfigOption,
    prompt: PromptArgument = None,
    file: PromptFileOption = None,
    set_: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Continue texts; without PROMPT and --file, all of stdin is one prompt."""
    out = Output(as_json)
    prompts = read_prompts(prompt or [], file)
    with _open(config, set_, out) as client:
        began_s = time.monotonic()
        replies = print_replies(client, prompts, out)
        seconds = time.monotonic() - began_s
        tokens = sum(len(client.tokenizer(reply)["input_ids"]) for reply in replies)
        out.result(
            {
                "replies": reply_pairs(prompts, replies),
                "num_tokens": tokens,
                "seconds": round(seconds, 3),
                "tokens_per_s": round(tokens / seconds, 2),
                **_traffic(client),
            }
        )


def chat(
    config: ConfigOption,
    set_: SetOption = None,
    max_length: LengthOption = None,
    as_json: JsonOption = False,
) -> None:
    """Talk with the model: one line of stdin is one message; /exit or the end of input leaves."""
    out = Output(as_json)
    turns: list[dict[str, str]] = []
    with _open(config, set_, out) as client:
        conversation = client.chat(max_length)
        try:
            for message in _messages(out):
                reply = ""
                for piece in conversation.ask(message):
                    out.stream(piece)
                    reply += piece
                out.stream("\n")
                turns.append({"message": message, "reply": reply})
        finally:
            conversation.close()
        out.result({"turns": turns, **_traffic(client)})


def _open(config: Path, overrides: Sequence[str] | None, out: Output) -> "Client":
    from cutlayer.cli.certificates import warn_of_expiry
    from cutlayer.client.client import Client
    from cutlayer.client.settings import ClientSettings
    from cutlayer.settings import load_settings

    settings = load_settings(ClientSettings, config, overrides or ())
    warn_of_expiry(settings.connection, out)
    return Client(settings)


def read_prompts(prompts: Sequence[str], file: Path | None) -> list[str]:
    """Prompts as they were given: as arguments, one per line of a file, or all of stdin as one.

    Raises:
        ConfigError: there is none, or they are given twice.
    """
    if prompts and file is not None:
        raise ConfigError("give prompts as arguments or --file, not both")
    if prompts:
        return list(prompts)
    if file is None or str(file) == "-":
        text = sys.stdin.read().rstrip("\n")
        found = [text] if file is None else text.splitlines()
    else:
        found = _read(file).splitlines()
    found = [line for line in found if line.strip()]
    if not found:
        raise ConfigError("there is no prompt; give one as an argument, by --file or on stdin")
    return found


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"cannot read prompts from {file}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{file} is not UTF-8 text ({error.reason}); convert it") from error


def _messages(out: Output) -> Iterator[str]:
    is_terminal = sys.stdin.isatty()
    while True:
        if is_terminal:
            out.stream("> ")
        line = sys.stdin.readline()
        if not line or line.strip() in _ENDS:
            return
        if line.strip():
            yield line.rstrip("\n")


def _traffic(client: "Client") -> dict[str, object]:
    from cutlayer.client.attested import level

    return {
        "bytes_up": client.trunk.bytes_sent,
        "bytes_down": client.trunk.bytes_received,
        "guarantee": client.guarantee,
        "assurance": level(client.attestation),
    }
