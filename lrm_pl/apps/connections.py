"""Connections of ``lrm serve``: none is held open by a client that does nothing, and every refusal is read.

uvicorn waits for ever for the head of a request, and for a client to take its answer; both hold one of the connections
that it accepts. And it hangs up on a client that is still sending, who then sees a reset in place of the answer.
"""

import asyncio
from typing import Any

from starlette.responses import JSONResponse
from starlette.types import Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

#: Seconds for a request's head to arrive.
HEAD_S = 10.0

#: Seconds for an answer to be taken.
ANSWER_S = 60.0

#: Seconds for which what a refused client goes on sending is read, and dropped.
_LINGER_S = 5.0


class BoundedProtocol(H11Protocol):
    """HTTP/1.1 whose connections end when nothing comes or nothing is taken."""

    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin to wait for a request."""
        super().connection_made(transport)
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
        self._set_timer(self.loop.call_later(ANSWER_S, self.transport.abort))

    def resume_writing(self) -> None:
        """It takes it."""
        super().resume_writing()
        self._await_head()

    def _await_head(self) -> None:
        self._set_timer(self.loop.call_later(HEAD_S, self._end_unless_busy))

    def _end_unless_busy(self) -> None:
        # ``close`` would wait for what is still to be sent
        if self.cycle is None or self.cycle.response_complete:
            self.transport.abort()

    def _set_timer(self, timer: asyncio.TimerHandle | None) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = timer


class Refusal(JSONResponse):
    """An answer to a request whose body was not read to its end: it is dropped while the client reads the answer.

    Args:
        content: What the answer says.
        status: Its status.
    """

    def __init__(self, content: dict[str, Any], status: int) -> None:
        super().__init__(content, status, {"Connection": "close"})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the answer, and end the connection once the client has ended its request."""
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        await send({"type": "http.response.body", "body": self.body, "more_body": True})
        try:
            async with asyncio.timeout(_LINGER_S):
                while (message := await receive())["type"] == "http.request" and message.get("more_body"):
                    pass
        except TimeoutError:
            pass  # it has had its time
        await send({"type": "http.response.body", "body": b"", "more_body": False})
