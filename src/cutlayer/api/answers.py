"""One request's answer over HTTP: whole or as a stream of events, and its end when nobody reads.

It does not choose the words (`shapes`) nor make tokens (`replies`).
"""

import asyncio
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from http import HTTPStatus

import msgspec
from fastapi import Response
from starlette.types import Receive, Scope, Send

from cutlayer.api.asks import Ask
from cutlayer.api.errors import ApiError, away, error_of
from cutlayer.api.replies import End, Piece, Replies
from cutlayer.api.shapes import Reply, Shape, Table, usage
from cutlayer.client.streams import Finish

__all__ = ["Answer"]

_SLACK_S = 1.0
_DONE = b"data: [DONE]\n\n"
_STREAM_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    # A proxy in front must not gather events.
    (b"x-accel-buffering", b"no"),
]


class Answer(Response):
    """Sends what `replies` gives; ends the streams behind it when the client is gone."""

    def __init__(
        self, ask: Ask, shape: Shape, model_name: str, replies: Replies, timeout_s: float
    ) -> None:
        super().__init__()
        self._timeout_s = timeout_s
        self._ask = ask
        self._shape = shape
        self._replies = replies
        self._head = {"id": f"{shape.id_prefix}{uuid.uuid4().hex}", "created": int(time.time())}
        self._model_name = model_name

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer, or stop at once when the connection is closed."""
        writing = asyncio.create_task(self._write(scope, receive, send))
        leaving = asyncio.create_task(_until_gone(receive))
        try:
            await asyncio.wait({writing, leaving}, return_when=asyncio.FIRST_COMPLETED)
            if writing.done():
                writing.result()
        finally:
            self._replies.cancel()
            for task in (writing, leaving):
                task.cancel()
            await asyncio.gather(writing, leaving, return_exceptions=True)

    async def _write(self, scope: Scope, receive: Receive, send: Send) -> None:
        # The engine ends a late stream itself, unless it waits for a server that is away.
        events = _in_time(self._replies.events(), self._timeout_s + _SLACK_S)
        try:
            if self._ask.is_stream:
                await self._stream(events, send)
                return
            response = await self._whole(events)
        except ApiError as error:
            response = error.response()
        await response(scope, receive, send)

    async def _whole(self, events: AsyncIterator[list[Piece | End]]) -> Response:
        replies = [Reply(choice=choice) for choice in range(self._ask.num_choices)]
        async for batch in events:
            for event in batch:
                _check(event)
                replies[event.choice].add(event)
        ends = [reply.end for reply in replies if reply.end is not None]
        table = {
            **self._head,
            "object": self._shape.whole_object,
            "model": self._model_name,
            "choices": [self._shape.whole(reply) for reply in replies],
            "usage": usage(self._ask, ends),
        }
        return Response(msgspec.json.encode(table), media_type="application/json")

    async def _stream(self, events: AsyncIterator[list[Piece | End]], send: Send) -> None:
        # An error before the first token is still an answer with a status of its own.
        first = await anext(events)
        _check(first[0])
        await send({"type": "http.response.start", "status": 200, "headers": _STREAM_HEADERS})
        await _send_chunk(send, self._openings())
        ends: list[End] = []
        try:
            await self._send_events(send, first, ends)
            async for batch in events:
                await self._send_events(send, batch, ends)
        except ApiError as error:
            await _send_chunk(send, b"data: " + error.body + b"\n\n", is_last=True)
            return
        last = self._chunk([], usage(self._ask, ends)) if self._ask.wants_usage else b""
        await _send_chunk(send, last + _DONE, is_last=True)

    async def _send_events(self, send: Send, batch: Sequence[Piece | End], ends: list[End]) -> None:
        chunks = []
        for event in batch:
            _check(event)
            if isinstance(event, End):
                ends.append(event)
                chunks.append(self._chunk([self._shape.ending(event)]))
            else:
                chunks.append(self._chunk([self._shape.piece(event)]))
        await _send_chunk(send, b"".join(chunks))

    def _openings(self) -> bytes:
        openings = (self._shape.opening(choice) for choice in range(self._ask.num_choices))
        return b"".join(self._chunk([table]) for table in openings if table is not None)

    def _chunk(self, choices: Sequence[Table], counts: Table | None = None) -> bytes:
        table: dict[str, object] = {
            **self._head,
            "object": self._shape.chunk_object,
            "model": self._model_name,
            "choices": choices,
        }
        if self._ask.wants_usage:
            table["usage"] = counts
        return b"data: " + msgspec.json.encode(table) + b"\n\n"


async def _in_time(
    events: AsyncIterator[list[Piece | End]], timeout_s: float
) -> AsyncIterator[list[Piece | End]]:
    """The events until the deadline; then ApiError."""
    loop = asyncio.get_running_loop()
    end_s = loop.time() + timeout_s
    while True:
        try:
            async with asyncio.timeout_at(end_s):
                batch = await anext(events, None)
        except TimeoutError as error:
            raise _late() from error
        if batch is None:
            return
        yield batch


def _late() -> ApiError:
    return ApiError(
        HTTPStatus.GATEWAY_TIMEOUT,
        "the request took longer than api.deadline_s; ask for fewer tokens, or stream them",
        kind="server_error",
        code="deadline_exceeded",
        # It would take as long again.
        headers={"x-should-retry": "false"},
    )


async def _send_chunk(send: Send, content: bytes, is_last: bool = False) -> None:
    await send({"type": "http.response.body", "body": content, "more_body": not is_last})


async def _until_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _check(event: Piece | End) -> None:
    """Raises ApiError where a reply ended before its end."""
    if not isinstance(event, End):
        return
    if event.error is not None:
        raise error_of(event.error)
    if event.stream.finish is Finish.CANCELLED:
        raise away("this endpoint is on its way out; ask again later", "shutting_down")
    if event.stream.finish is Finish.DEADLINE:
        raise _late()
