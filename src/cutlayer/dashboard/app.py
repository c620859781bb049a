"""The page over HTTP: which path answers what, to whom, and with which headers.

It does not listen (`serve`) nor know a server (`view`). Without the token there is no content:
only /healthz, /readyz and the empty page's own files (`static`) answer everybody.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from http import HTTPStatus
from importlib.resources import files
from urllib.parse import parse_qs

import msgspec
from fastapi import FastAPI, Request, Response

from cutlayer.dashboard.auth import Gate
from cutlayer.dashboard.rates import RateMeter
from cutlayer.dashboard.view import PageState, ServerView
from cutlayer.errors import CutlayerError

__all__ = ["create_app"]

_HEADERS = {
    # No inline code, nothing from elsewhere, no frame, and no way from a text to markup.
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
        "connect-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'; "
        "require-trusted-types-for 'script'; trusted-types 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), geolocation=(), microphone=()",
    "Cache-Control": "no-store",
}
_TYPES = {
    "page.js": "text/javascript",
    "charts.js": "text/javascript",
    "format.js": "text/javascript",
    "style.css": "text/css",
    "icon.svg": "image/svg+xml",
}
_MAX_FORM_BYTES = 4096
_SAMPLE_S = 1.0
_CHALLENGE = {"WWW-Authenticate": 'Bearer realm="cutlayer"'}


def create_app(
    view: ServerView, gate: Gate, is_encrypted: bool, clock: Callable[[], float] = time.monotonic
) -> FastAPI:
    """The application; `is_encrypted` makes its cookie travel by HTTPS only."""
    meter = RateMeter()

    @asynccontextmanager
    async def sampling(_: FastAPI) -> AsyncIterator[None]:
        task = asyncio.create_task(_sample(view, meter, clock))
        yield
        task.cancel()

    app = FastAPI(
        lifespan=sampling, docs_url=None, redoc_url=None, openapi_url=None, redirect_slashes=False
    )
    app.middleware("http")(_with_headers)
    _add_health(app, view)
    _add_content(app, view, gate, meter)
    _add_page(app, gate, is_encrypted)
    return app


async def _sample(view: ServerView, meter: RateMeter, clock: Callable[[], float]) -> None:
    while True:
        meter.add(clock(), await asyncio.to_thread(view.totals))
        await asyncio.sleep(_SAMPLE_S)


async def _with_headers(
    request: Request, answer: Callable[[Request], Awaitable[Response]]
) -> Response:
    response = await answer(request)
    response.headers.update(_HEADERS)
    return response


def _add_health(app: FastAPI, view: ServerView) -> None:
    @app.get("/healthz")
    def healthz() -> Response:
        return _text("ok\n")

    @app.get("/readyz")
    def readyz() -> Response:
        if view.is_ready():
            return _text("ready\n")
        return _text("not ready\n", HTTPStatus.SERVICE_UNAVAILABLE)


def _add_content(app: FastAPI, view: ServerView, gate: Gate, meter: RateMeter) -> None:
    @app.get("/metrics")
    def metrics(request: Request) -> Response:
        if not _is_admitted(request, gate):
            return _refusal()
        return Response(view.metrics(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.get("/api/state")
    def state(request: Request) -> Response:
        if not _is_admitted(request, gate):
            return _refusal()
        try:
            page = PageState(server=view.snapshot(), rates=meter.rates())
        except CutlayerError as error:
            return _text(f"{error}\n", HTTPStatus.SERVICE_UNAVAILABLE)
        return Response(msgspec.json.encode(page), media_type="application/json")


def _add_page(app: FastAPI, gate: Gate, is_encrypted: bool) -> None:
    static = {name: _file(name) for name in _TYPES}
    index, login_form = _file("index.html"), _file("login.html")
    wrong_form = login_form.replace(b'role="alert" hidden', b'role="alert"')

    @app.get("/")
    def page(request: Request) -> Response:
        if _is_admitted(request, gate):
            return _html(index)
        return _html(login_form, HTTPStatus.UNAUTHORIZED)

    @app.get("/static/{name}")
    def static_file(name: str) -> Response:
        if name not in static:
            return _text("no such file\n", HTTPStatus.NOT_FOUND)
        return Response(static[name], media_type=_TYPES[name])

    @app.post("/login")
    async def login(request: Request) -> Response:
        if not gate.is_token(await _form_token(request)):
            return _html(wrong_form, HTTPStatus.UNAUTHORIZED)
        response = _to_page()
        response.set_cookie(
            gate.cookie_name,
            gate.new_cookie(),
            secure=is_encrypted,
            httponly=True,
            samesite="strict",
        )
        return response

    @app.post("/logout")
    def logout() -> Response:
        response = _to_page()
        response.delete_cookie(gate.cookie_name)
        return response


def _is_admitted(request: Request, gate: Gate) -> bool:
    authorization = request.headers.get("authorization")
    if authorization is not None:
        return gate.is_bearer(authorization)
    return gate.is_cookie(request.cookies.get(gate.cookie_name))


async def _form_token(request: Request) -> str:
    """The form's token; empty where there is none, or the body is longer than any form of ours."""
    body = b""
    async for chunk in request.stream():
        body += chunk
        if len(body) > _MAX_FORM_BYTES:
            return ""
    fields = parse_qs(body.decode("ascii", errors="replace"))
    return fields.get("token", [""])[0].strip()


def _refusal() -> Response:
    return _text(
        "the token is missing or wrong; send it as `Authorization: Bearer TOKEN`\n",
        HTTPStatus.UNAUTHORIZED,
        _CHALLENGE,
    )


def _to_page() -> Response:
    return Response(status_code=HTTPStatus.SEE_OTHER, headers={"Location": "./"})


def _text(
    text: str, status: HTTPStatus = HTTPStatus.OK, headers: dict[str, str] | None = None
) -> Response:
    return Response(text, status_code=status, media_type="text/plain", headers=headers)


def _html(content: bytes, status: HTTPStatus = HTTPStatus.OK) -> Response:
    return Response(content, status_code=status, media_type="text/html")


def _file(name: str) -> bytes:
    return (files("cutlayer.dashboard") / "static" / name).read_bytes()
