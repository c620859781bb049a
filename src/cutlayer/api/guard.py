"""Who may ask: the host that a browser believes to speak to, the site that sends it, the token.

It stands before every path. What is asked is not its affair.
"""

from http import HTTPStatus
from urllib.parse import urlsplit

from fastapi import Request
from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cutlayer.api.errors import ApiError
from cutlayer.web.auth import Gate
from cutlayer.web.pages import PAGE_HEADERS, is_admitted
from cutlayer.web.settings import ApiSettings, is_loopback_host

__all__ = ["Guard"]

_OPEN = frozenset({"/", "/healthz", "/login", "/logout"})
"""Paths that answer without the token; the page itself then shows its form."""
_SAFE = frozenset({"GET", "HEAD", "OPTIONS"})


class Guard:
    """ASGI middleware: refuses, or lets through and adds the headers of our pages."""

    def __init__(self, app: ASGIApp, gate: Gate | None, settings: ApiSettings) -> None:
        self._app = app
        self._gate = gate
        # Without token and beyond loopback nothing is served; with a token, a page that reached us
        # by a rebound name has no cookie of ours.
        self._checks_host = gate is None or settings.is_local

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer, or say why not."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request = Request(scope)
        refusal = self._refusal(request)
        if refusal is None:
            await self._app(scope, receive, _with_headers(send))
        else:
            await refusal.response()(scope, receive, _with_headers(send))

    def _refusal(self, request: Request) -> ApiError | None:
        if self._checks_host and not _is_own_name(request.headers.get("host", "")):
            return ApiError(
                HTTPStatus.FORBIDDEN,
                "this endpoint answers to localhost and loopback addresses alone; another name in "
                "the Host header may be a web site that was rebound to this machine",
                code="host_not_allowed",
            )
        if request.method not in _SAFE and not _is_same_site(request):
            return ApiError(
                HTTPStatus.FORBIDDEN,
                "a web page of another origin sent this request; pages may not use this endpoint",
                code="origin_not_allowed",
            )
        # As the router sees it: a URL is put together from the Host header too.
        path = str(request.scope["path"])
        is_open = path in _OPEN or path.startswith("/static/")
        if self._gate is None or is_open or is_admitted(request, self._gate):
            return None
        return _no_token(is_given="authorization" in request.headers)


def _no_token(is_given: bool) -> ApiError:
    text = "Incorrect API key provided" if is_given else "You didn't provide an API key"
    return ApiError(
        HTTPStatus.UNAUTHORIZED,
        f"{text}: this endpoint's key is the content of its token file (api.token_file), sent as "
        "`Authorization: Bearer KEY`.",
        code="invalid_api_key",
        headers={"WWW-Authenticate": 'Bearer realm="cutlayer"'},
    )


def _is_own_name(host: str) -> bool:
    """Whether a Host header names this machine by a name that no other site can have."""
    try:
        name = urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return False
    return is_loopback_host(name)


def _is_same_site(request: Request) -> bool:
    """Whether a program sends it, or a page of this very origin."""
    site = request.headers.get("sec-fetch-site")
    if site is not None:
        return site in ("same-origin", "none")
    origin = request.headers.get("origin")
    if origin is None:
        return True
    try:
        return urlsplit(origin).netloc == request.headers.get("host")
    except ValueError:
        return False


def _with_headers(send: Send) -> Send:
    async def sending(message: Message) -> None:
        if message["type"] == "http.response.start":
            MutableHeaders(scope=message).update(PAGE_HEADERS)
        await send(message)

    return sending
