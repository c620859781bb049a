"""Which path answers what: the OpenAI API's, the chat page's, and the state behind it.

It does not listen (`serve`), let in (`guard`), read requests (`bodies`, `asks`) nor write answers
(`answers`).
"""

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import TypeVar

import msgspec
from fastapi import FastAPI, Request, Response
from starlette.exceptions import HTTPException

from cutlayer.api.answers import Answer
from cutlayer.api.asks import Ask, Asker
from cutlayer.api.bodies import Body, ChatBody, CompletionBody, parse_body
from cutlayer.api.engine import ServedModel, TokenEngine
from cutlayer.api.errors import ApiError, error_of
from cutlayer.api.guard import Guard
from cutlayer.api.page import add_page
from cutlayer.api.replies import Places, Replies
from cutlayer.api.shapes import ChatShape, CompletionShape, Shape
from cutlayer.api.token_bytes import TokenBytes
from cutlayer.errors import CutlayerError
from cutlayer.web.auth import Gate
from cutlayer.web.settings import ApiSettings

__all__ = ["create_app"]

T = TypeVar("T", bound=Body)


@dataclass(kw_only=True)
class _Endpoint:
    """What all paths share."""

    engine: TokenEngine
    model: ServedModel
    settings: ApiSettings
    asker: Asker
    names: TokenBytes
    places: Places
    began_s: int = field(default_factory=lambda: int(time.time()))

    async def answer(
        self,
        request: Request,
        kind: type[T],
        read: Callable[[T], Ask],
        shape: Callable[[Ask, TokenBytes], Shape],
    ) -> Response:
        """Read a request, begin its replies; the answer sends them."""
        body = parse_body(kind, await self._content(request))
        self.check_model(body.model)
        # Long prompts must not keep other streams' tokens waiting.
        ask = await asyncio.to_thread(read, body)
        replies = Replies(self.engine, self.places)
        limit_s = self.settings.deadline_s
        replies.submit(ask, self.model, time.monotonic() + limit_s)
        return Answer(ask, shape(ask, self.names), self.model.name, replies, limit_s)

    def check_model(self, name: str) -> None:
        """Raises ApiError for any other model."""
        if name != self.model.name:
            raise ApiError(
                HTTPStatus.NOT_FOUND,
                f"The model '{name[:200]}' does not exist; this endpoint has '{self.model.name}'.",
                param="model",
                code="model_not_found",
            )

    async def _content(self, request: Request) -> bytes:
        """The body.

        Raises:
            ApiError: it is not JSON, too long, or does not come.
        """
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":
            text = "send the body as Content-Type: application/json"
            raise ApiError(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, text)
        content, limit = bytearray(), self.settings.max_body_bytes
        chunks = request.stream()
        while True:
            try:
                async with asyncio.timeout(self.settings.stall_s):
                    chunk = await anext(chunks, None)
            except TimeoutError as error:
                text = "the body did not arrive within api.stall_s"
                raise ApiError(HTTPStatus.REQUEST_TIMEOUT, text) from error
            if chunk is None:
                return bytes(content)
            content += chunk
            if len(content) > limit:
                text = f"the body has more than {limit} bytes (api.max_body_bytes)"
                raise ApiError(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, text)


def create_app(
    engine: TokenEngine, model: ServedModel, settings: ApiSettings, gate: Gate | None
) -> FastAPI:
    """The application; without a gate everybody on this machine may ask."""
    endpoint = _Endpoint(
        engine=engine,
        model=model,
        settings=settings,
        asker=Asker(model),
        names=TokenBytes(model.tokenizer),
        places=Places(settings.max_queue),
    )
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None, redirect_slashes=False)
    app.add_middleware(Guard, gate=gate, settings=settings)
    _add_errors(app)
    _add_models(app, endpoint)
    _add_generation(app, endpoint)
    add_page(app, engine, model, endpoint.places, gate, is_encrypted=settings.is_encrypted)
    return app


def _add_errors(app: FastAPI) -> None:
    @app.exception_handler(CutlayerError)
    async def refused(request: Request, error: Exception) -> Response:
        assert isinstance(error, CutlayerError)
        return error_of(error).response()

    @app.exception_handler(HTTPException)
    async def unknown(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        path = str(request.scope["path"])
        text = f"Unknown request URL: {request.method} {path[:200]}."
        headers = dict(error.headers or {})
        return ApiError(error.status_code, text, code="unknown_url", headers=headers).response()


def _add_models(app: FastAPI, endpoint: _Endpoint) -> None:
    about = {
        "id": endpoint.model.name,
        "object": "model",
        "created": endpoint.began_s,
        "owned_by": "cutlayer",
        "max_model_len": endpoint.model.context_length,
    }

    @app.get("/v1/models")
    def models() -> Response:
        return _json({"object": "list", "data": [about]})

    @app.get("/v1/models/{name:path}")
    def model(name: str) -> Response:
        endpoint.check_model(name)
        return _json(about)


def _add_generation(app: FastAPI, endpoint: _Endpoint) -> None:
    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        return await endpoint.answer(request, ChatBody, endpoint.asker.chat, ChatShape)

    @app.post("/v1/completions")
    async def completion(request: Request) -> Response:
        read = endpoint.asker.completion
        return await endpoint.answer(request, CompletionBody, read, CompletionShape)


def _json(table: dict[str, object]) -> Response:
    return Response(msgspec.json.encode(table), media_type="application/json")
