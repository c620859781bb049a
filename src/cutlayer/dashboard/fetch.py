"""A server's state by HTTP, for `cutlayer status`. It shows nothing.

The token goes to the address that was named and nowhere else: no proxy of the environment, no
redirect, and no plain HTTP beyond loopback.
"""

import ssl
import urllib.error
import urllib.request
from http import HTTPStatus
from http.client import HTTPException
from pathlib import Path
from urllib.parse import urlsplit

import msgspec

from cutlayer.dashboard.view import PageState
from cutlayer.errors import (
    ConfigError,
    CutlayerError,
    PermissionRefused,
    ProtocolError,
    TransportError,
)
from cutlayer.web.settings import is_loopback_host

__all__ = ["fetch_state"]

_TIMEOUT_S = 10.0
_MAX_BYTES = 64 << 20


def fetch_state(url: str, token: str, authority: Path | None = None) -> PageState:
    """What the page at `url` shows now.

    Args:
        url: the page's address, such as http://127.0.0.1:7445.
        token: what the server's token file holds.
        authority: PEM certificates to trust for HTTPS; None trusts those of the system.

    Raises:
        ConfigError: an address that is none, or that would send the token in the clear.
        TransportError: nobody answers there, or HTTPS fails.
        PermissionRefused: it is not that server's token.
        ProtocolError: what answers is no page of a cutlayer server of this version.
    """
    _check(url)
    request = urllib.request.Request(
        f"{url.rstrip('/')}/api/state", headers={"Authorization": f"Bearer {token}"}
    )
    try:
        return msgspec.json.decode(_answer(request, authority, url), type=PageState)
    except msgspec.DecodeError as error:
        raise ProtocolError(
            f"{url} answers something else than this version's state: {error}; check the address "
            "and the server's version"
        ) from error


def _check(url: str) -> None:
    try:
        parts = urlsplit(url)
        host = parts.hostname or ""
    except ValueError:
        parts, host = urlsplit(""), ""
    if parts.scheme not in ("http", "https") or not host or parts.username or parts.query:
        raise ConfigError(f"{url!r} is no address of a page; one is http://127.0.0.1:7445")
    if parts.scheme == "http" and not is_loopback_host(host):
        raise ConfigError(
            f"{url} is plain HTTP beyond loopback and would send the token in the clear; use https"
        )


def _answer(request: urllib.request.Request, authority: Path | None, url: str) -> bytes:
    try:
        with _opener(authority).open(request, timeout=_TIMEOUT_S) as response:
            body: bytes = response.read(_MAX_BYTES + 1)
    except urllib.error.HTTPError as error:
        with error:
            raise _refusal(error, url) from error
    except (urllib.error.URLError, HTTPException, OSError) as error:
        reason = getattr(error, "reason", None) or error
        raise TransportError(
            f"no page answers at {url}: {reason}; is the server running, with [http] in its "
            "settings?"
        ) from error
    if len(body) > _MAX_BYTES:
        raise ProtocolError(f"{url} answers more than {_MAX_BYTES} bytes")
    return body


def _refusal(error: urllib.error.HTTPError, url: str) -> CutlayerError:
    if error.code == HTTPStatus.UNAUTHORIZED:
        return PermissionRefused(f"{url} refuses the token; use the file that this server made")
    text = error.read(1000).decode(errors="replace").strip()
    if error.code == HTTPStatus.SERVICE_UNAVAILABLE:
        return TransportError(f"{url} cannot tell its state: {text}")
    return ProtocolError(f"{url} answers {error.code}; it is no page of a cutlayer server")


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_: object) -> None:
        """A redirect would carry the token elsewhere."""
        return None


def _opener(authority: Path | None) -> urllib.request.OpenerDirector:
    try:
        context = ssl.create_default_context(cafile=authority)
    except (OSError, ssl.SSLError) as error:
        raise ConfigError(f"{authority} holds no certificate in PEM form: {error}") from error
    return urllib.request.build_opener(
        urllib.request.ProxyHandler({}),
        urllib.request.HTTPSHandler(context=context),
        _NoRedirect(),
    )
