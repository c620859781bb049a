"""Settings of the server's web page. It lives here, below `dashboard`, for it is a section of a
trunk server's file; it serves nothing.
"""

from pathlib import Path
from typing import Self

from pydantic import Field, field_validator, model_validator

from cutlayer.settings import Settings
from cutlayer.wire.endpoints import is_loopback

__all__ = ["HttpSettings", "HttpTls"]


class HttpTls(Settings):
    """PEM files of the page; a browser has to trust the certificate's issuer."""

    certificate: Path
    """Certificate, followed by its intermediates if there are any."""
    key: Path
    """Private key of the certificate, not encrypted, mode 0600."""


class HttpSettings(Settings):
    """The server's web page and `/metrics`, behind a token."""

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
        if self.tls is not None and self.plaintext_behind_proxy:
            raise ValueError("http.tls and plaintext_behind_proxy=true are both set; remove one")
        if self.tls or self.plaintext_behind_proxy or is_loopback(self.address):
            return self
        raise ValueError(
            f"http.address={self.address} is beyond loopback and would send the token in the "
            "clear; set http.tls, or plaintext_behind_proxy=true where a proxy adds HTTPS"
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
    def is_encrypted(self) -> bool:
        """Whether browsers reach the page by HTTPS, so that cookies may insist on it."""
        return self.tls is not None or self.plaintext_behind_proxy
