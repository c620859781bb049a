"""The page over HTTP: which path answers what, to whom, and with which headers.

It does not listen (`serve`) nor know a server (`view`). Without the token there is no content:
only /healthz, /readyz and the empty page's own files (`static`) answer everybody.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from http import HTTPStatus

import msgspec
from fastapi import FastAPI, Request, Response

from cutlayer.dashboard.rates import RateMeter
from cutlayer.dashboard.view import PageState, ServerView
from cutlayer.errors import CutlayerError
from cutlayer.web.auth import Gate
from cutlayer.web.pages import (
    add_login,
    add_static,
    html,
    is_admitted,
    page_file,
    plain_text,
    with_headers,
)

__all__ = ["create_app"]

_STATIC = ("page.js", "charts.js", "format.js", "style.css", "icon.svg")
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
    app.middleware("http")(with_headers)
    _add_health(app, view)
    _add_content(app, view, gate, meter)
    _add_page(app, gate, is_encrypted)
    return app


async def _sample(view: ServerView, meter: RateMeter, clock: Callable[[], float]) -> None:
    while True:
        meter.add(clock(), await asyncio.to_thread(view.totals))
        await asyncio.sleep(_SAMPLE_S)


def _add_health(app: FastAPI, view: ServerView) -> None:
    @app.get("/healthz")
    def healthz() -> Response:
        return plain_text("ok\n")

    @app.get("/readyz")
    def readyz() -> Response:
        if view.is_ready():
            return plain_text("ready\n")
        return plain_text("not ready\n", HTTPStatus.SERVICE_UNAVAILABLE)


def _add_content(app: FastAPI, view: ServerView, gate: Gate, meter: RateMeter) -> None:
    @app.get("/metrics")
    def metrics(request: Request) -> Response:
        if not is_admitted(request, gate):
            return _refusal()
        return Response(view.metrics(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.get("/api/state")
    def state(request: Request) -> Response:
        if not is_admitted(request, gate):
            return _refusal()
        try:
            page = PageState(server=view.snapshot(), rates=meter.rates())
        except CutlayerError as error:
            return plain_text(f"{error}\n", HTTPStatus.SERVICE_UNAVAILABLE)
        return Response(msgspec.json.encode(page), media_type="application/json")


def _add_page(app: FastAPI, gate: Gate, is_encrypted: bool) -> None:
    index, form = page_file("dashboard", "index.html"), page_file("dashboard", "login.html")
    add_static(app, "dashboard", _STATIC)
    add_login(app, gate, is_encrypted, form)

    @app.get("/")
    def page(request: Request) -> Response:
        if is_admitted(request, gate):
            return html(index)
        return html(form, HTTPStatus.UNAUTHORIZED)


def _refusal() -> Response:
    return plain_text(
        "the token is missing or wrong; send it as `Authorization: Bearer TOKEN`\n",
        HTTPStatus.UNAUTHORIZED,
        _CHALLENGE,
    )
