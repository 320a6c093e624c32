"""Connections of ``lrm serve``: none is held open by a client that does nothing, and every refusal is read.

uvicorn waits for ever for the head of a request, and for a client to take its answer, on any number of connections.
"""

import asyncio
import contextlib

from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

#: Seconds for a request's head to arrive.
HEAD_S = 10.0

#: Seconds in which some of an answer must be taken.
ANSWER_S = 30.0

#: Seconds for which what a refused client goes on sending is read, and dropped.
LINGER_S = 5.0

#: Connections that may be open: less than the files that a process may usually have open.
CONNECTIONS = 500


class BoundedProtocol(H11Protocol):
    """HTTP/1.1 whose connections end when nothing comes or nothing is taken."""

    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin to wait for a request."""
        super().connection_made(transport)
        if len(self.connections) > CONNECTIONS:
            transport.abort()
        else:
            self._await_head()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop waiting."""
        super().connection_lost(exc)
        self._set_timer(None)

    def on_response_complete(self) -> None:
        """Begin to wait for the next request."""
        if not self.flow.write_paused:
            self._await_head()
        super().on_response_complete()

    def pause_writing(self) -> None:
        """Begin to wait for the client to take its answer."""
        super().pause_writing()
        self._await_taking()

    def resume_writing(self) -> None:
        """It takes it."""
        super().resume_writing()
        self._await_head()

    def _await_head(self) -> None:
        self._set_timer(self.loop.call_later(HEAD_S, self._end_unless_busy))

    def _await_taking(self) -> None:
        left = self.transport.get_write_buffer_size()
        self._set_timer(self.loop.call_later(ANSWER_S, self._end_unless_taken, left))

    def _end_unless_taken(self, left: int) -> None:
        if self.transport.get_write_buffer_size() < left:
            self._await_taking()
        else:
            self.transport.abort()

    def _end_unless_busy(self) -> None:
        # ``close`` would wait for what is still to be sent
        if self.cycle is None or self.cycle.response_complete:
            self.transport.abort()

    def _set_timer(self, timer: asyncio.TimerHandle | None) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = timer


class Lingering:
    """Middleware: where an answer is given before the request's body was read, the rest is read and dropped.

    uvicorn would hang up in the middle of what the client sends, who then sees a reset in place of the answer.

    Args:
        app: The application.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer, and end the answer once the client has ended its request."""
        ended = scope["type"] != "http"

        async def receive_some() -> Message:
            nonlocal ended
            message = await receive()
            ended = message["type"] != "http.request" or not message.get("more_body")
            return message

        async def send_and_linger(message: Message) -> None:
            if message["type"] == "http.response.body" and not message.get("more_body") and not ended:
                await send({**message, "more_body": True})
                with contextlib.suppress(TimeoutError):  # it has had its time
                    async with asyncio.timeout(LINGER_S):
                        while not ended:
                            await receive_some()
                message = {"type": "http.response.body"}
            await send(message)

        await self.app(scope, receive_some, send_and_linger)
