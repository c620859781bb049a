"""Settings of a masked part, and of a worker for masked parts. It starts nothing."""

from enum import StrEnum
from pathlib import Path
from typing import Literal, Self

from pydantic import Field, field_validator, model_validator

from cutlayer.settings import Settings
from cutlayer.tee.masked.address import check_address
from cutlayer.tee.masked.broken import ONE_TIME_PAD, check_scheme

__all__ = ["MaskedSettings", "MaskedWorkerSettings", "PadSourceKind"]


class PadSourceKind(StrEnum):
    """Who multiplies the pads."""

    DEALER = "dealer"
    PRECOMPUTE = "precompute"


class MaskedSettings(Settings):
    """Frozen linear layers of this side's parts run masked on an accelerator; docs/masked.md."""

    accelerator: str
    """Worker that multiplies masked numbers: unix:PATH or HOST:PORT."""
    scheme: str = ONE_TIME_PAD
    """one-time-pad; the names of masks that are known to be broken are refused with the attack."""
    source: PadSourceKind = PadSourceKind.DEALER
    """dealer: a second worker, of somebody else, multiplies the pads; precompute: this machine
    does while it is idle."""
    dealer: str | None = None
    """dealer: the second worker, unix:PATH or HOST:PORT; never the accelerator."""
    dealer_key: str | None = None
    """dealer: its public key in hex, which it prints when it starts; the link is sealed with it."""
    allow_same_machine: bool = False
    """Accept a dealer on the accelerator's machine: for tests, whoever owns it sees everything."""
    weight_bits: Literal[8, 16] = 16
    """16 keeps a float32 layer's numbers to 1e-4; 8 halves the work and rounds weights to 0.4 %."""
    pool_tokens: int = Field(default=64, ge=1)
    """precompute: tokens per layer and direction for which pads are kept ready."""
    when_exhausted: Literal["wait", "fail"] = "wait"
    """precompute: what a call does for which no pads are ready."""
    timeout_s: float = Field(default=60.0, gt=0)
    """A worker that is silent for so long is gone."""

    @field_validator("scheme")
    @classmethod
    def _hides(cls, name: str) -> str:
        return check_scheme(name)

    @field_validator("accelerator", "dealer")
    @classmethod
    def _is_address(cls, address: str | None) -> str | None:
        return None if address is None else check_address(address)

    @model_validator(mode="after")
    def _has_two_workers(self) -> Self:
        if self.source is not PadSourceKind.DEALER:
            return self
        if self.dealer is None or self.dealer_key is None:
            raise ValueError('source = "dealer" wants dealer and dealer_key')
        if self.dealer == self.accelerator:
            raise ValueError(
                "dealer and accelerator are one worker, which would know every pad and what it "
                "masks; start the dealer on somebody else's machine"
            )
        return self


class MaskedWorkerSettings(Settings):
    """One worker for masked parts."""

    role: Literal["accelerator", "dealer"]
    """accelerator: multiplies masked numbers; dealer: multiplies pads. Never one for both."""
    listen: str
    """unix:PATH or HOST:PORT; it computes for whoever reaches it."""
    device: str = "cpu"
    """torch device."""
    kernel: Literal["float64", "float32", "int8"] = "float64"
    """How products stay exact: float64 where it is fast, int8 on GPUs, float32 on GPUs without."""
    threads: int | None = Field(default=None, ge=1)
    """Compute threads; None leaves torch's own choice."""
    key_file: Path | None = None
    """dealer: its private key, drawn at the first start, mode 0600."""
    max_weight_bytes: int = Field(default=1 << 34, ge=1)
    """Bytes of all layers that it holds."""
    idle_s: float | None = Field(default=None, gt=0)
    """A connection that is silent for so long is closed; None never."""

    @field_validator("listen")
    @classmethod
    def _is_address(cls, address: str) -> str:
        return check_address(address)

    @model_validator(mode="after")
    def _has_a_key(self) -> Self:
        if (self.role == "dealer") != (self.key_file is not None):
            raise ValueError("key_file is for a dealer, which needs one")
        return self
