"""What a plan rests on, with where each number comes from; kept in a file to be planned elsewhere.

It measures nothing (`measure`) and predicts nothing.
"""

import json
from pathlib import Path
from typing import Annotated, Self

from pydantic import AfterValidator, Field, model_validator

from cutlayer.errors import ConfigError
from cutlayer.settings import Settings, parse_settings
from cutlayer.storage.files import write_atomic

__all__ = [
    "BlockSpeed",
    "EndsSpeed",
    "LinkSpeed",
    "Measured",
    "Measurements",
    "read_measurements",
    "write_measurements",
]

_FORMAT = 1
_MAX_BYTES = 1 << 20
_LONGEST_S = 1e6
"""A file is another machine's: numbers beyond any machine's make sums without end."""


def _printable(text: str) -> str:
    if not text.isprintable():
        raise ValueError("text with control characters")
    return text


_Words = Annotated[str, Field(max_length=500), AfterValidator(_printable)]
"""Shown on the terminal of whoever plans with the file."""


class BlockSpeed(Settings):
    """One block on one side's machine."""

    forward_s: float | None = Field(default=None, ge=0, le=_LONGEST_S)
    """Seconds per 1,000 tokens of training, forward; None is unknown."""
    backward_s: float | None = Field(default=None, ge=0, le=_LONGEST_S)
    """Seconds per 1,000 tokens of training, backward."""
    optimizer_s: float = Field(default=0.0, ge=0, le=_LONGEST_S)
    """Seconds per optimizer step."""
    prefill_s: float | None = Field(default=None, ge=0, le=_LONGEST_S)
    """Seconds per 1,000 prompt tokens."""
    decode_s: float | None = Field(default=None, ge=0, le=_LONGEST_S)
    """Seconds per token of every stream."""
    codec_s: float = Field(default=0.0, ge=0, le=_LONGEST_S)
    """Seconds per 1,000 tokens that come in and go out again; of a call, not of a block."""


class EndsSpeed(Settings):
    """What a client does beside its blocks: embedding, gate, LM head and loss."""

    head_s: float = Field(ge=0, le=_LONGEST_S)
    """Seconds per 1,000 tokens of training, before they leave."""
    tail_s: float = Field(ge=0, le=_LONGEST_S)
    """Seconds per 1,000 tokens of training, from their return to the gradient."""
    prefill_s: float = Field(ge=0, le=_LONGEST_S)
    """Seconds of a prompt's call."""
    decode_s: float = Field(ge=0, le=_LONGEST_S)
    """Seconds per token of every stream."""


class LinkSpeed(Settings):
    """The way between the two, the same in both directions."""

    rtt_s: float = Field(ge=0, le=_LONGEST_S)
    """Seconds of a call without tensors, there and back."""
    mbit_per_s: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    """10^6 bits per second; None is unlimited."""


class Measured(Settings):
    """A number of bytes and where it comes from."""

    num_bytes: int = Field(ge=0)
    """Bytes."""
    source: _Words
    """Measured here, given or default."""


class Measurements(Settings):
    """Everything that a plan is told of the two machines and the link."""

    format: int = _FORMAT
    """Of the file."""
    machine: _Words = ""
    """Whose numbers these are, in words."""
    model: _Words = ""
    """Which model's shapes were timed, in words; empty where none was."""
    work: _Words = ""
    """Which work was timed, in words."""
    client: BlockSpeed = BlockSpeed()
    """A block at the client."""
    client_source: _Words = "unknown"
    """Where they come from."""
    ends: EndsSpeed | None = None
    """The client's ends of the model; None is unknown."""
    ends_source: _Words = "unknown"
    """Where they come from."""
    server: BlockSpeed = BlockSpeed()
    """A block at the server."""
    server_source: _Words = "unknown"
    """Where they come from."""
    link: LinkSpeed | None = None
    """None is unknown."""
    link_source: _Words = "unknown"
    """Where it comes from."""
    baseline: Measured | None = None
    """Memory of a client process without any part of a model."""
    client_memory: Measured | None = None
    """What the client may use in all; None sets no limit."""
    server_memory: Measured | None = None
    """What the server may use in all; None sets no limit."""

    @model_validator(mode="after")
    def _is_known(self) -> Self:
        if self.format != _FORMAT:
            raise ValueError(f"measurements of format {self.format}; this release has {_FORMAT}")
        return self


def read_measurements(path: Path) -> Measurements:
    """Read what `write_measurements` wrote.

    Raises:
        ConfigError: missing, malformed or of another release.
    """
    try:
        with path.open("rb") as file:
            data = file.read(_MAX_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"cannot read measurements {path}: {error.strerror}") from error
    if len(data) > _MAX_BYTES:
        raise ConfigError(f"{path} holds no measurements: it is larger than {_MAX_BYTES} bytes")
    try:
        table = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path} holds no measurements ({error})") from error
    if not isinstance(table, dict):
        raise ConfigError(f"{path} holds no measurements; write it with --save-measurements")
    return parse_settings(Measurements, table, where=str(path))


def write_measurements(path: Path, measurements: Measurements) -> None:
    """Write them for `read_measurements`.

    Raises:
        StorageError: the file cannot be written.
    """
    write_atomic(path, (measurements.model_dump_json(indent=1) + "\n").encode())
