"""A connection to the service. The gate sees no request before its head is read, which uvicorn bounds in no way."""

import asyncio
import json
import logging
from http import HTTPStatus
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from app.service.settings import settings

logger = logging.getLogger("bentoml.pixelcnn")

MAX_HEAD_BYTES = 2**16  # beside those that come with the first


class Connection(HttpToolsProtocol):
    """Refuses, and closes, where a head is too large, takes longer than a body may, or is no HTTP.

    An answer that its client does not take is cut off. All requests of a client that has left are told so, not only the
    last one that it sent ahead.
    """

    _head_bytes: int | None = None  # of the head that comes; None between heads
    _timer: asyncio.TimerHandle | None = None  # runs while a head is awaited
    _send_timer: asyncio.TimerHandle | None = None  # runs while the client has taken too little for more to be sent
    _cycles: tuple[Any, ...] = ()  # the requests that are not answered yet

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._await_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._end_timer()
        self.resume_writing()
        super().connection_lost(exc)
        for cycle in self._cycles:
            cycle.disconnected = not cycle.response_complete
            cycle.message_event.set()

    def data_received(self, data: bytes) -> None:
        before = self._head_bytes
        super().data_received(data)
        if self._head_bytes is not None and before is not None:
            self._head_bytes += len(data)
            if self._head_bytes > MAX_HEAD_BYTES:
                self._refuse(431, f"the request's headers must have at most {MAX_HEAD_BYTES} bytes: send fewer.")
        if self._timer is None and (self._head_bytes is not None or not self.cycle or self.cycle.response_complete):
            self._await_head()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._send_timer = self.loop.call_later(settings.send_timeout_s, self._cut_off)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._send_timer is not None:
            self._send_timer.cancel()

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._head_bytes = 0

    def on_headers_complete(self) -> None:
        self._head_bytes = None
        self._end_timer()
        super().on_headers_complete()
        self._cycles = tuple(c for c in (*self._cycles, self.cycle) if c and not c.response_complete)

    def send_400_response(self, msg: str) -> None:
        self._refuse(400, "this is no HTTP request that can be read: /docs.json says what to send.")

    def _await_head(self) -> None:
        self._timer = self.loop.call_later(settings.body_timeout_s, self._give_up)

    def _end_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _cut_off(self) -> None:
        logger.warning("a client took nothing for %g s: its answer was cut off.", settings.send_timeout_s)
        self.transport.abort()

    def _give_up(self) -> None:
        if self._head_bytes is None:  # nothing was begun, as by a browser that connects ahead
            self.transport.close()
        else:
            text = f"the request's headers took longer than {settings.body_timeout_s} s to arrive: send it anew."
            self._refuse(408, text)

    def _refuse(self, status: int, text: str) -> None:
        self._end_timer()
        body = json.dumps({"error": text}).encode()
        head = f"HTTP/1.1 {status} {HTTPStatus(status).phrase}\r\ncontent-type: application/json\r\n"
        self.transport.write(f"{head}content-length: {len(body)}\r\nconnection: close\r\n\r\n".encode() + body)
        self.transport.close()
