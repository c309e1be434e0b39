"""The service's gate, an ASGI middleware: who may enter, how many at once, and one form for every error.

BentoML's `max_concurrency` does not replace it: that counts GET /models too, comes before the token is checked, and
refuses without `Retry-After`. Its `timeout` does, for answers: api.py sets it.
"""

import asyncio
import hashlib
import hmac
import json
import logging
import os
import random
from collections import Counter
from contextvars import ContextVar
from http import HTTPStatus

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.service.settings import HEALTH_CHECKS, settings
from app.service.wire import quoted

logger = logging.getLogger("bentoml.pixelcnn")

RETRY_AFTER_S = (3, 8)  # drawn anew for each, so that clients that were refused together do not return together
CLIENT_HEADER = b"x-client"  # a name for one of several clients behind an address, such as a visit of the canvas

client: ContextVar[str] = ContextVar("client", default="")  # who sent the request that is answered, hashed


class Gate:
    """Admit requests within bounds; give every error the form `{"error": sentence}`.

    A client that disconnects cancels its request: nothing is computed that nobody waits for.
    """

    def __init__(self, app: ASGIApp, token: str = "") -> None:
        self.app = app
        self.token = token  # of the header `Authorization: Bearer ...`, health checks apart; empty for an open service
        self.active: Counter[str] = Counter()  # requests in flight of each client that has any

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        headers = dict(scope["headers"])
        sent, wanted = headers.get(b"authorization", b""), b"Bearer " + os.fsencode(self.token)
        # Constant time: how long it takes tells nothing of how much of the token is right.
        if self.token and scope["path"] not in HEALTH_CHECKS and not hmac.compare_digest(sent, wanted):
            text = "this service wants a token: send the header Authorization: Bearer with its PIXELCNN_TOKEN."
            return await _refusal(401, text, {"WWW-Authenticate": "Bearer"})(scope, receive, send)
        if scope["method"] != "POST":
            return await self._answer(scope, receive, send)
        address, _ = scope.get("client") or ("", 0)
        asker = hashlib.blake2b(headers.get(CLIENT_HEADER) or address.encode(), digest_size=8).hexdigest()
        if self.active.total() >= settings.max_requests:
            text = f"the service is busy with {self.active.total()} requests: send this one again in a few seconds."
            return await _refusal(429, text)(scope, receive, send)
        if self.active[asker] >= settings.max_client_requests:
            text = f"you have {self.active[asker]} requests here already: send this one once one is answered."
            return await _refusal(429, text)(scope, receive, send)
        self.active[asker] += 1
        client.set(asker)
        try:
            await self._answer_while_connected(scope, receive, send)
        finally:
            self.active[asker] -= 1
            self.active += Counter()  # forget those without any

    async def _answer_while_connected(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer, unless the client disconnects."""
        body_read = asyncio.Event()
        has_begun = False

        async def receive_and_note_end() -> Message:
            message = await receive()
            if not message.get("more_body"):  # nor has a disconnect any
                body_read.set()
            if message["type"] == "http.disconnect":  # whoever reads the body would call that a failure of ours
                await asyncio.Event().wait()  # until cancel_on_disconnect has cancelled it
            return message

        async def send_and_note(message: Message) -> None:
            nonlocal has_begun
            has_begun = True
            # A chunked body that is refused half-read may never end: close the connection.
            has_length = "content-length" in Headers(scope=scope)
            if message["type"] == "http.response.start" and not body_read.is_set() and not has_length:
                MutableHeaders(scope=message)["connection"] = "close"
            await send(message)

        async def cancel_on_disconnect() -> None:
            await body_read.wait()
            while (await receive())["type"] != "http.disconnect":
                pass
            answer.cancel()

        answer = asyncio.create_task(self._answer(scope, receive_and_note_end, send_and_note))
        disconnect = asyncio.create_task(cancel_on_disconnect())
        try:
            await asyncio.wait((answer,))
            if not answer.cancelled():
                answer.result()
            elif disconnect.done() and not has_begun:  # Nobody reads this, but BentoML's own timer waits for an answer.
                await _refusal(499, "the client has left.")(scope, receive, send)
        finally:
            answer.cancel()
            disconnect.cancel()

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the application's answer on, with every error rewritten as `{"error": sentence}`."""
        has_begun = False
        error: Message | None = None  # the start of an error's response, held back until its body is complete
        body = b""

        async def send_rewritten(message: Message) -> None:
            nonlocal has_begun, error, body
            has_begun = True
            if message["type"] == "http.response.start" and message["status"] >= 400:
                error = message
            elif error is None:
                await send(message)
            else:
                body += message.get("body", b"")
                if not message.get("more_body"):
                    status = error["status"]
                    kept = {k.decode(): v.decode() for k, v in error["headers"] if k.lower() in (b"allow", b"server")}
                    await _refusal(status, _sentence_of(scope, status, body), kept)(scope, receive, send)

        try:
            await self.app(scope, receive, send_rewritten)
        except Exception:
            # Answered here, or BentoML would wait until its timeout.
            logger.exception("a request failed")
            if not has_begun:
                await _refusal(500, "the service failed: its log says why.")(scope, receive, send)


def _refusal(status: int, text: str, headers: dict[str, str] | None = None) -> JSONResponse:
    retry = {"Retry-After": str(random.randint(*RETRY_AFTER_S))} if status in (429, 503) else {}
    return JSONResponse({"error": text}, status, {**(headers or {}), **retry})


def _sentence_of(scope: Scope, status: int, body: bytes) -> str:
    """Return the sentence for an error that the service or BentoML made."""
    try:
        values = json.loads(body)
        # BentoML wraps its own exceptions' text into a list.
        return str((values[0] if isinstance(values, list) else values)["error"])
    except (ValueError, LookupError, TypeError):
        if status == HTTPStatus.NOT_FOUND:
            return f"there is nothing at {quoted(scope['path'])}: /docs.json lists what there is."
        if status == HTTPStatus.METHOD_NOT_ALLOWED:
            return f"{quoted(scope['path'])} does not take {quoted(scope['method'])}: /docs.json says what it takes."
        return f"the request failed: {HTTPStatus(status).phrase}."
