"""The `[[hops]]` of a client's settings: places of the trunk, in order. It does nothing."""

from enum import StrEnum
from pathlib import Path
from typing import Self

from pydantic import Field, model_validator

from cutlayer.errors import ConfigError
from cutlayer.model.chain import Hop, PlaceKind, check_trunks
from cutlayer.privacy.mechanism import NoiseSettings
from cutlayer.settings import Settings
from cutlayer.wire.endpoints import CodecName, TlsFiles

__all__ = [
    "HopConnectionSettings",
    "HopPlace",
    "HopPrivacySettings",
    "HopSettings",
    "HopTeeSettings",
    "check_hops",
]


class HopPlace(StrEnum):
    """Who runs a stretch of the trunk."""

    SERVER = "server"
    MEMBER = "member"


class HopConnectionSettings(Settings):
    """Where a hop after the first is; what is not here is as in [connection]."""

    address: str
    """host:port of its trunk server."""
    server_name: str | None = None
    """Name that its certificate must have, where it is not the address's host."""
    codec: CodecName = "bf16"
    """Codec of released tensors in both directions: raw, bf16, fp8, int8."""
    tls: TlsFiles | None = None
    """Files of mutual TLS for this hop; absent takes those of [connection]."""


class HopTeeSettings(Settings):
    """What a hop after the first must prove; own evidence and keys are as in [tee]."""

    policy: Path
    """What is accepted: a file made by `cutlayer attest policy init`."""
    required: bool = True
    """Without accepted evidence nothing leaves for this hop. False goes on with one that shows
    none."""
    reattest_s: float = Field(default=300.0, gt=0)
    """Seconds after which it must prove anew before the next call."""


class HopPrivacySettings(Settings):
    """Noise on what a hop after the first is given. `mechanism` has no default on purpose."""

    mechanism: str
    """Noise on the hidden states that it is given; a hop without noise says "none"."""
    scale: float | None = None
    """Scale of that noise, as in [privacy]."""
    clip: float | None = None
    """Norm bound, for the mechanisms that clip."""
    gradient_mechanism: str = "none"
    """Noise on the gradients that it is given."""
    gradient_scale: float | None = None
    """Scale of that noise."""
    gradient_clip: float | None = None
    """Norm bound of those gradients."""

    @model_validator(mode="after")
    def _makes_sense(self) -> Self:
        self.noise()
        return self

    def noise(self) -> NoiseSettings:
        """The same as a client's noise settings."""
        return NoiseSettings.model_validate(self.model_dump())


class HopSettings(Settings):
    """One place of the trunk and its blocks."""

    place: HopPlace = HopPlace.SERVER
    """server, or member: another owner that hosts trunk blocks."""
    lower: int = Field(ge=0)
    """Its first block; that of the first hop is model.lower."""
    upper: int = Field(ge=0)
    """First block after its own; that of the last hop is model.upper."""
    connection: HopConnectionSettings | None = None
    """Where it is. The first hop has none: it is at [connection], with [tee] and [privacy]."""
    tee: HopTeeSettings | None = None
    """What it must prove; absent asks for no proof."""
    privacy: HopPrivacySettings | None = None
    """What noise protects what it is given; required after the first hop."""

    @property
    def hop(self) -> Hop:
        """Place and blocks."""
        return Hop(PlaceKind(self.place.value), range(self.lower, self.upper))


def check_hops(
    hops: tuple[HopSettings, ...], lower: int, upper: int, address: str, has_own_first: bool = False
) -> None:
    """Refuse hops that do not cover the trunk, or do not say where they are.

    Args:
        hops: in order; none is the U.
        lower: model.lower.
        upper: first block after the last hop.
        address: of [connection].
        has_own_first: the first hop is at a place of its own too, as [connection] is another's.

    Raises:
        ConfigError: says which hop is wrong and what to do.
    """
    if not hops:
        return
    check_trunks([hop.hop for hop in hops], lower, upper)
    first, later = hops[0], hops if has_own_first else hops[1:]
    has_place = first.connection is not None or first.tee is not None or first.privacy is not None
    if has_place and not has_own_first:
        raise ConfigError(
            "the first of [[hops]] is at [connection], with [tee] and [privacy]; remove its own "
            "connection, tee and privacy"
        )
    _check_later(later, address, 1 if has_own_first else 2)


def _check_later(hops: tuple[HopSettings, ...], address: str, first_number: int) -> None:
    addresses = [address]
    for number, hop in enumerate(hops, start=first_number):
        if hop.connection is None or hop.privacy is None:
            missing = "connection" if hop.connection is None else "privacy"
            raise ConfigError(
                f"hop {number} has no [hops.{missing}]: say where it is and what noise protects "
                'what it is given (mechanism = "none" for no noise)'
            )
        addresses.append(hop.connection.address)
    if len(set(addresses)) != len(addresses):
        raise ConfigError(
            f"two of [[hops]] are at one address ({', '.join(addresses)}): one server is one hop; "
            "give it all of these blocks"
        )
