"""A connection to the service. The gate sees no request before its head is read, and no reader that takes nothing."""

import asyncio
import json
import logging
from http import HTTPStatus
from typing import Any

import h11
from uvicorn import Config
from uvicorn.protocols.http.h11_impl import H11Protocol

from app.service.settings import settings

logger = logging.getLogger("bentoml.pixelcnn")

MAX_HEAD_BYTES = 2**16  # beside those that come with the last; of trailers, too


class Connection(H11Protocol):
    """Refuses, and closes, where a head is too large, takes longer than a body may, or is no HTTP.

    An answer of which its client takes nothing is cut off. Not by httptools, which bounds neither heads nor trailers.
    """

    _timer: asyncio.TimerHandle | None = None  # runs while anything of a request is awaited, unless one is answered
    _awaited = "a request"
    _send_timer: asyncio.TimerHandle | None = None  # runs while the client has taken too little for more to be sent

    def __init__(self, config: Config, **given: Any) -> None:
        config.h11_max_incomplete_event_size = MAX_HEAD_BYTES
        super().__init__(config, **given)

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        transport.set_write_buffer_limits(0)  # what is not taken is noticed, also of little, and after `close`
        self._await(self._awaited)

    def connection_lost(self, exc: Exception | None) -> None:
        self._await("nothing")
        self.resume_writing()
        super().connection_lost(exc)

    def handle_events(self) -> None:
        super().handle_events()
        awaited = "a request"
        if self.transport.is_closing() or (self.cycle and not self.cycle.response_complete):
            awaited = "nothing"
        elif self.conn.their_state is not h11.IDLE:
            awaited = "the rest of a refused body"
        elif self.conn.trailing_data[0]:
            awaited = "the rest of a head"
        if awaited != self._awaited:
            self._await(awaited)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._await_reader()

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._send_timer is not None:
            self._send_timer.cancel()

    def send_400_response(self, msg: str) -> None:
        if len(self.conn.trailing_data[0]) > MAX_HEAD_BYTES:
            self._refuse(431, f"the request's headers must have at most {MAX_HEAD_BYTES} bytes: send fewer.")
        else:
            self._refuse(400, "this is no HTTP request that can be read: /docs.json says what to send.")

    def _await(self, awaited: str) -> None:
        self._awaited = awaited
        if self._timer is not None:
            self._timer.cancel()
        if awaited != "nothing":
            self._timer = self.loop.call_later(settings.body_timeout_s, self._give_up)

    def _give_up(self) -> None:
        if self._awaited == "the rest of a head":
            text = f"the request's headers took longer than {settings.body_timeout_s} s to arrive: send it anew."
            self._refuse(408, text)
        else:  # nothing was begun, as by a browser that connects ahead; or it has its answer
            self.transport.close()

    def _await_reader(self) -> None:
        size = self.transport.get_write_buffer_size()
        self._send_timer = self.loop.call_later(settings.send_timeout_s, self._cut_off_unless_read, size)

    def _cut_off_unless_read(self, size: int) -> None:
        if self.transport.get_write_buffer_size() < size:
            return self._await_reader()
        logger.warning("a client took nothing for %g s: its answer was cut off.", settings.send_timeout_s)
        self.transport.abort()

    def _refuse(self, status: int, text: str) -> None:
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):  # not into an answer
            body = json.dumps({"error": text}).encode()
            head = f"HTTP/1.1 {status} {HTTPStatus(status).phrase}\r\ncontent-type: application/json\r\n"
            self.transport.write(f"{head}content-length: {len(body)}\r\nconnection: close\r\n\r\n".encode() + body)
        self.transport.close()
