"""Who may look at the page: the token file, and the gate that every request passes.

It does not speak HTTP (`app`). A browser that showed the token gets a cookie that is no token: an
expiry time and its HMAC under the token, so it outlives restarts and dies with the token.
"""

import hashlib
import secrets
from collections.abc import Callable
from hmac import compare_digest
from hmac import new as new_hmac
from pathlib import Path

from cutlayer.errors import ConfigError
from cutlayer.storage.files import private_folder, read_private, write_atomic

__all__ = ["MIN_TOKEN_CHARS", "Gate", "ensure_token", "read_token"]

MIN_TOKEN_CHARS = 32
_CONTEXT = b"cutlayer page login until "


def ensure_token(path: Path) -> str:
    """The token in the file; a missing file is made with a random one, mode 0600.

    Raises:
        StorageError: others may read the file, or it cannot be written.
        ConfigError: what it holds is too short to be a token.
    """
    if not path.exists():
        if not path.parent.exists():
            private_folder(path.parent)
        write_atomic(path, f"{secrets.token_urlsafe(32)}\n".encode())
    return read_token(path)


def read_token(path: Path) -> str:
    """The token that a server made.

    Raises:
        StorageError: the file is missing, or others may read it.
        ConfigError: it holds no token.
    """
    token = read_private(path).decode("ascii", errors="replace").strip()
    if len(token) < MIN_TOKEN_CHARS or not token.isascii() or not token.isprintable():
        raise ConfigError(
            f"{path} holds no token of at least {MIN_TOKEN_CHARS} letters and digits; remove it, "
            "and the server makes a new one"
        )
    return token


class Gate:
    """Compares in constant time; says yes or no and nothing else."""

    def __init__(self, token: str, login_s: float, now_s: Callable[[], float]) -> None:
        self._token = token.encode()
        self._login_s = login_s
        self._now_s = now_s
        # Cookies do not know ports: pages of two servers on one host must not meet.
        self.cookie_name = f"cutlayer_{hashlib.sha256(self._token).hexdigest()[:12]}"

    def is_token(self, given: str) -> bool:
        """Whether this is the token."""
        return compare_digest(given.encode(), self._token)

    def is_bearer(self, authorization: str | None) -> bool:
        """Whether an `Authorization` header carries the token."""
        scheme, _, given = (authorization or "").partition(" ")
        return self.is_token(given.strip()) and scheme.lower() == "bearer"

    def new_cookie(self) -> str:
        """The value for a browser that showed the token just now."""
        expires = str(int(self._now_s() + self._login_s))
        return f"{expires}.{self._signature(expires)}"

    def is_cookie(self, value: str | None) -> bool:
        """Whether this gate made the cookie and it has not expired."""
        expires, _, signature = (value or "").partition(".")
        is_ours = compare_digest(signature.encode(), self._signature(expires).encode())
        # A signed text is one that we made, so it is a number.
        return is_ours and self._now_s() < int(expires)

    def _signature(self, expires: str) -> str:
        return new_hmac(self._token, _CONTEXT + expires.encode(), "sha256").hexdigest()
