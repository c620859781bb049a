"""Settings of both ends of a connection, and the files of mutual TLS.

It does not connect, and does not know what a certificate says about its holder (`identity`).
"""

import ipaddress
import ssl
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, Field, field_validator

from cutlayer.errors import ConfigError
from cutlayer.settings import Settings
from cutlayer.wire.codec import get_codec
from cutlayer.wire.frame import FrameLimits

__all__ = [
    "CodecName",
    "ConnectionSettings",
    "ListenSettings",
    "TlsFiles",
    "check_security",
    "is_loopback",
    "read_tls",
]


def _known_codec(name: str) -> str:
    try:
        get_codec(name)
    except ConfigError as error:
        raise ValueError(str(error)) from error
    return name


CodecName = Annotated[str, AfterValidator(_known_codec)]
"""The name of a codec that there is."""


class TlsFiles(Settings):
    """PEM files of one side."""

    certificate: Path
    """Own certificate, followed by its intermediates if there are any."""
    key: Path
    """Private key of the certificate, not encrypted, mode 0600."""
    authority: Path
    """Certificates of the federation's authority: only peers that it signed are accepted."""


class _EndpointSettings(Settings):
    address: str
    """host:port; [host]:port for IPv6."""
    tls: TlsFiles | None = None
    """Files of mutual TLS; required unless `plaintext`."""
    plaintext: bool = False
    """True sends everything unencrypted to anybody; accepted on loopback addresses only."""
    keepalive_s: float = Field(default=20.0, ge=10.0)
    """Seconds of silence until a ping; a peer that does not answer it is gone."""
    keepalive_timeout_s: float = Field(default=20.0, gt=0.0)
    """Seconds that a ping may take."""
    max_frame_bytes: int = Field(default=256 << 20, ge=4096)
    """Largest frame that this side accepts."""
    max_in_flight: int = Field(default=16, ge=1, le=1024)
    """Calls of one connection that may be unanswered at once."""

    @field_validator("address")
    @classmethod
    def _has_port(cls, address: str) -> str:
        host, _, port = address.rpartition(":")
        if not host or not port.isdigit() or int(port) > 65535:
            raise ValueError("an address has the form host:port, such as trunk.example.org:7443")
        return address

    @property
    def limits(self) -> FrameLimits:
        """What this side accepts of a frame."""
        return FrameLimits(max_frame_bytes=self.max_frame_bytes)


class ConnectionSettings(_EndpointSettings):
    """The client's end."""

    server_name: str | None = None
    """Name that the server's certificate must have, where it is not the address's host."""
    codec: CodecName = "bf16"
    """Codec of released tensors in both directions: raw, bf16, fp8, int8."""
    deadline_s: float = Field(default=120.0, gt=0.0)
    """Seconds without one byte of progress until a call fails."""
    connect_timeout_s: float = Field(default=10.0, gt=0.0)
    """Seconds to reach the server, refused attempts included."""


class ListenSettings(_EndpointSettings):
    """The server's end."""

    max_streams: int = Field(default=64, ge=1, le=4096)
    """Connections at once; two threads each."""
    max_client_streams: int = Field(default=16, ge=1)
    """Connections at once of one certificate's name."""
    stall_timeout_s: float = Field(default=60.0, gt=0.0)
    """Seconds for which a peer may keep a started frame from moving until it is cut off."""
    recheck_s: float = Field(default=1.0, gt=0.0)
    """How often open connections are checked for revocation and stalls."""


def check_security(settings: ConnectionSettings | ListenSettings) -> None:
    """Refuse an insecure combination.

    Raises:
        ConfigError: neither or both of `tls` and `plaintext`, or plaintext off loopback.
    """
    if settings.plaintext and settings.tls is not None:
        raise ConfigError("plaintext=true and tls files are both set; remove one of them")
    if settings.tls is None and not settings.plaintext:
        raise ConfigError(
            f"no tls files for {settings.address}; make them with `cutlayer provision`"
        )
    if settings.plaintext and not is_loopback(settings.address):
        raise ConfigError(
            f"plaintext=true with address {settings.address}: only loopback addresses such as "
            "127.0.0.1 may be unencrypted; use tls files"
        )


def read_tls(files: TlsFiles) -> tuple[bytes, bytes, bytes]:
    """The PEM bytes of key, certificate and authority.

    Raises:
        ConfigError: a file is missing, is no PEM, or the key is not the certificate's.
    """
    contents = []
    for path in (files.key, files.certificate, files.authority):
        try:
            contents.append(path.read_bytes())
        except OSError as error:
            raise ConfigError(f"cannot read tls file {path}: {error.strerror}") from error
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    try:
        # an encrypted key would otherwise ask for its password on the terminal
        context.load_cert_chain(files.certificate, files.key, password=lambda: b"")
    except (OSError, ssl.SSLError) as error:
        raise ConfigError(
            f"{files.certificate} and {files.key} are not a certificate and its unencrypted "
            f"private key in PEM form: {_reason(error)}"
        ) from error
    try:
        context.load_verify_locations(files.authority)
    except (OSError, ssl.SSLError) as error:
        raise ConfigError(
            f"{files.authority} holds no certificate in PEM form: {_reason(error)}"
        ) from error
    key, certificate, authority = contents
    return key, certificate, authority


def is_loopback(address: str) -> bool:
    """Whether host:port is on this machine."""
    host = address.rpartition(":")[0].strip("[]")
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _reason(error: OSError | ssl.SSLError) -> str:
    return getattr(error, "reason", None) or error.strerror or "unreadable"
