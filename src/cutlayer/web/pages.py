"""What all pages have in common: headers, files, and the way from a token to a cookie.

It does not decide what a page shows, nor whether there is a gate.
"""

import asyncio
from collections.abc import Awaitable, Callable
from http import HTTPStatus
from importlib.resources import files
from urllib.parse import parse_qs

from fastapi import FastAPI, Request, Response

from cutlayer.web.auth import Gate

__all__ = [
    "PAGE_HEADERS",
    "add_login",
    "add_static",
    "html",
    "is_admitted",
    "page_file",
    "plain_text",
    "with_headers",
]

PAGE_HEADERS = {
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
"""On every answer."""
_TYPES = {".js": "text/javascript", ".css": "text/css", ".svg": "image/svg+xml"}
_MAX_FORM_BYTES = 4096
_FORM_S = 10.0


async def with_headers(
    request: Request, answer: Callable[[Request], Awaitable[Response]]
) -> Response:
    """Middleware that adds `PAGE_HEADERS`."""
    response = await answer(request)
    response.headers.update(PAGE_HEADERS)
    return response


def add_static(app: FastAPI, room: str, names: tuple[str, ...]) -> None:
    """Answer /static/NAME with these files of the room's folder `static`, to everybody."""
    contents = {name: page_file(room, name) for name in names}

    @app.get("/static/{name}")
    def static_file(name: str) -> Response:
        if name not in contents:
            return plain_text("no such file\n", HTTPStatus.NOT_FOUND)
        return Response(contents[name], media_type=_TYPES[name[name.rindex(".") :]])


def add_login(app: FastAPI, gate: Gate, is_encrypted: bool, form: bytes) -> None:
    """Exchange the form's token for a cookie; `is_encrypted` makes it travel by HTTPS only."""
    wrong_form = form.replace(b'role="alert" hidden', b'role="alert"')

    @app.post("/login")
    async def login(request: Request) -> Response:
        if not gate.is_token(await _form_token(request)):
            return html(wrong_form, HTTPStatus.UNAUTHORIZED)
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


def is_admitted(request: Request, gate: Gate) -> bool:
    """Whether the request shows the token or a cookie for it; a wrong token is never saved."""
    authorization = request.headers.get("authorization")
    if authorization is not None:
        return gate.is_bearer(authorization)
    return gate.is_cookie(request.cookies.get(gate.cookie_name))


def plain_text(
    text: str, status: HTTPStatus = HTTPStatus.OK, headers: dict[str, str] | None = None
) -> Response:
    """An answer in plain text."""
    return Response(text, status_code=status, media_type="text/plain", headers=headers)


def html(content: bytes, status: HTTPStatus = HTTPStatus.OK) -> Response:
    """A page."""
    return Response(content, status_code=status, media_type="text/html")


def page_file(room: str, name: str) -> bytes:
    """A file of the room's folder `static`."""
    return (files(f"cutlayer.{room}") / "static" / name).read_bytes()


async def _form_token(request: Request) -> str:
    """The form's token; empty where there is none, or the body is longer than any form of ours,
    or takes longer to come."""
    body = b""
    try:
        async with asyncio.timeout(_FORM_S):
            async for chunk in request.stream():
                body += chunk
                if len(body) > _MAX_FORM_BYTES:
                    return ""
    except TimeoutError:
        return ""
    fields = parse_qs(body.decode("ascii", errors="replace"))
    return fields.get("token", [""])[0].strip()


def _to_page() -> Response:
    return Response(status_code=HTTPStatus.SEE_OTHER, headers={"Location": "./"})
