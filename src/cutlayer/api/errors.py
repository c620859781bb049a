"""Errors as the OpenAI API has them: a status, and a JSON object that clients take apart.

It does not answer. What failed behind the endpoint is mapped here, in one place.
"""

import math
from http import HTTPStatus

import msgspec
from fastapi import Response

from cutlayer.errors import (
    BudgetExceeded,
    CacheFull,
    ConfigError,
    CutlayerError,
    PermissionRefused,
    SessionLost,
    TransportError,
)

__all__ = [
    "ApiError",
    "away",
    "context_exceeded",
    "error_of",
    "invalid",
    "too_busy",
    "unsupported",
]

_INVALID = "invalid_request_error"
_SERVER = "server_error"
_RETRY_S = 1.0
_MAX_RETRY_S = 3600.0


class ApiError(CutlayerError):
    """A request that gets no reply, in the words of that API."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = _INVALID,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self._error = {"message": message, "type": kind, "param": param, "code": code}
        self._headers = headers

    @property
    def body(self) -> bytes:
        """The JSON object."""
        return msgspec.json.encode({"error": self._error})

    def response(self) -> Response:
        """The whole answer."""
        return Response(
            self.body,
            status_code=self.status,
            media_type="application/json",
            headers=self._headers,
        )


def invalid(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """The request is wrong; sent again it stays wrong."""
    return ApiError(HTTPStatus.BAD_REQUEST, message, param=param, code=code)


def unsupported(param: str, why: str) -> ApiError:
    """A field that the API knows and this endpoint does not do."""
    return invalid(f"{param} is not supported here: {why}", param, "unsupported_parameter")


def context_exceeded(context: int, num_prompt: int, num_new: int, param: str) -> ApiError:
    """Prompt and reply do not fit into the model's context."""
    return invalid(
        f"This model's maximum context length is {context} tokens. However, you requested "
        f"{num_prompt + num_new} tokens ({num_prompt} in the {param}, {num_new} in the "
        f"completion). Please reduce the length of the {param} or completion.",
        param,
        "context_length_exceeded",
    )


def too_busy(message: str, retry_after_s: float | None = None) -> ApiError:
    """Ask again later; official clients do so by themselves."""
    return ApiError(
        HTTPStatus.TOO_MANY_REQUESTS,
        message,
        kind="rate_limit_error",
        code="rate_limit_exceeded",
        headers={"Retry-After": str(math.ceil(_bounded(retry_after_s)))},
    )


def away(message: str, code: str = "trunk_unavailable") -> ApiError:
    """The trunk server does not answer, or this endpoint is on its way out."""
    return ApiError(
        HTTPStatus.SERVICE_UNAVAILABLE,
        message,
        kind=_SERVER,
        code=code,
        headers={"Retry-After": str(math.ceil(_RETRY_S))},
    )


def _bounded(retry_after_s: float | None) -> float:
    """Seconds that a trunk server asks for, if it may be believed: it may send any number."""
    if retry_after_s is None or not 0 < retry_after_s < math.inf:
        return _RETRY_S
    return min(retry_after_s, _MAX_RETRY_S)


def error_of(error: CutlayerError) -> ApiError:
    """What failed behind the endpoint, as the API would say it."""
    text = str(error)
    if isinstance(error, ApiError):
        return error
    if isinstance(error, BudgetExceeded):
        # Not 429: clients would ask again, and no wait opens a spent budget.
        code = "privacy_budget_exceeded"
        return ApiError(HTTPStatus.FORBIDDEN, text, kind=code, code=code)
    if isinstance(error, CacheFull):
        return too_busy(text, error.retry_after_s)
    if isinstance(error, TransportError | SessionLost):
        return away(text)
    if isinstance(error, PermissionRefused):
        return away(text, "trunk_refused")
    if isinstance(error, ConfigError):
        return invalid(text)
    return ApiError(HTTPStatus.INTERNAL_SERVER_ERROR, text, kind=_SERVER, code="internal_error")
