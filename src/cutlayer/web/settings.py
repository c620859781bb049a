"""Settings of what speaks HTTP: the trunk server's page, and the owner's endpoint. They live here,
below both, for they are sections of the sides' own files; nothing is served here.
"""

import ipaddress
from pathlib import Path
from typing import ClassVar, Self

from pydantic import Field, field_validator, model_validator

from cutlayer.settings import Settings

__all__ = ["ApiSettings", "HttpSettings", "HttpTls", "is_loopback_host"]


class HttpTls(Settings):
    """PEM files of HTTPS; whoever connects has to trust the certificate's issuer."""

    certificate: Path
    """Certificate, followed by its intermediates if there are any."""
    key: Path
    """Private key of the certificate, not encrypted, mode 0600."""


class HttpSettings(Settings):
    """The server's web page and `/metrics`, behind a token."""

    section: ClassVar[str] = "http"

    address: str = "127.0.0.1:7445"
    """host:port; [host]:port for IPv6; port 0 picks one."""
    token_file: Path | None = None
    """Who knows its content may look; made at the first start. None: `http.token` in the state
    folder."""
    tls: HttpTls | None = None
    """Files of HTTPS; needed beyond loopback."""
    plaintext_behind_proxy: bool = False
    """True allows plain HTTP beyond loopback: a proxy in front must speak HTTPS to the outside."""
    login_s: float = Field(default=43_200.0, gt=0)
    """Seconds until a browser has to show the token again."""

    @field_validator("address")
    @classmethod
    def _has_port(cls, address: str) -> str:
        host, _, port = address.rpartition(":")
        if not host or not port.isdecimal() or int(port) > 65535:
            raise ValueError("an address has the form host:port, such as 127.0.0.1:7445")
        return address

    @model_validator(mode="after")
    def _is_protected(self) -> Self:
        name = self.section
        if self.tls is not None and self.plaintext_behind_proxy:
            raise ValueError(f"{name}.tls and plaintext_behind_proxy=true are both set; remove one")
        if self.tls or self.plaintext_behind_proxy or self.is_local:
            return self
        raise ValueError(
            f"{name}.address={self.address} is beyond loopback and would send the token in the "
            f"clear; set {name}.tls, or plaintext_behind_proxy=true where a proxy adds HTTPS"
        )

    @property
    def host(self) -> str:
        """Where it listens, without brackets."""
        return self.address.rpartition(":")[0].strip("[]")

    @property
    def port(self) -> int:
        """As set; 0 picks one."""
        return int(self.address.rpartition(":")[2])

    @property
    def is_local(self) -> bool:
        """Whether only this machine reaches it."""
        return is_loopback_host(self.host)

    @property
    def is_encrypted(self) -> bool:
        """Whether browsers reach it by HTTPS, so that cookies may insist on it."""
        return self.tls is not None or self.plaintext_behind_proxy


class ApiSettings(HttpSettings):
    """The owner's OpenAI-compatible endpoint and its chat page."""

    section: ClassVar[str] = "api"

    address: str = "127.0.0.1:7446"
    """host:port; [host]:port for IPv6; port 0 picks one."""
    token_file: Path | None = None
    """Who knows its content may ask, as API key or at the page; made at the first start. None: no
    token on loopback, else `api.token` in the run folder."""
    model_name: str | None = None
    """The model's id as clients name it; None takes the last part of `model.path`."""
    max_queue: int = Field(default=64, ge=1)
    """Replies under way or waiting at once; more are refused with status 429."""
    deadline_s: float = Field(default=600.0, gt=0)
    """Seconds that a request may take, its wait included."""
    stall_s: float = Field(default=30.0, gt=0)
    """Seconds for which a client may leave its reply unread, or its request unsent, until it is
    cut off."""
    max_body_bytes: int = Field(default=4_194_304, ge=1024)
    """Largest request, in bytes."""
    drain_s: int = Field(default=30, ge=0)
    """Seconds that replies under way get at the end."""

    @property
    def needs_token(self) -> bool:
        """Whether there is a token: always beyond loopback."""
        return self.token_file is not None or self.is_encrypted or not self.is_local


def is_loopback_host(host: str) -> bool:
    """Whether a host without brackets and port is this machine itself."""
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
