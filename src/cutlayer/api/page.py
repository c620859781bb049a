"""The chat page and what it shows: its files, its form where there is a token, and /status.

Replies come through the same paths as everybody's (`app`).
"""

import time
from http import HTTPStatus

import msgspec
from fastapi import FastAPI, Request, Response

from cutlayer.api.engine import EngineStatus, ServedModel, TokenEngine
from cutlayer.api.replies import Places
from cutlayer.web.auth import Gate
from cutlayer.web.pages import add_login, add_static, html, is_admitted, page_file, plain_text

__all__ = ["add_page"]

_STATIC = ("chat.js", "style.css", "icon.svg")
_COUNTS = (
    *("bytes_down", "bytes_up", "num_round_trips", "num_round_trips_saved"),
    *("num_sessions_replayed", "num_streams", "num_tokens", "num_vectors_released"),
    *("num_vectors_replayed", "num_waiting", "tokens_per_s", "guarantee"),
)


def add_page(
    app: FastAPI,
    engine: TokenEngine,
    model: ServedModel,
    places: Places,
    gate: Gate | None,
    *,
    is_encrypted: bool,
) -> None:
    """Answer /, /static, /status, /healthz and, where there is a gate, /login and /logout."""
    index, form = page_file("api", "index.html"), page_file("api", "login.html")
    add_static(app, "api", _STATIC)
    if gate is not None:
        add_login(app, gate, is_encrypted, form)
    began_s = time.monotonic()

    @app.get("/")
    def page(request: Request) -> Response:
        if gate is None or is_admitted(request, gate):
            return html(index)
        return html(form, HTTPStatus.UNAUTHORIZED)

    @app.get("/healthz")
    def healthz() -> Response:
        return plain_text("ok\n")

    @app.get("/status")
    def status() -> Response:
        table = {
            "model": model.name,
            "context_length": model.context_length,
            "has_chat_template": model.tokenizer.chat_template is not None,
            "has_token": gate is not None,
            "uptime_s": time.monotonic() - began_s,
            "num_replies": places.num_taken,
            **_counts(engine.status()),
        }
        return Response(msgspec.json.encode(table), media_type="application/json")


def _counts(status: EngineStatus) -> dict[str, object]:
    return {name: getattr(status, name) for name in _COUNTS}
