"""The service's gate, an ASGI middleware: who may enter, how many at once, and one form for every error.

A client that goes away ends its request: nothing is computed for nobody.
"""

import asyncio
import hmac
import json
import logging
import os
import random
from http import HTTPStatus
from typing import Any

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

logger = logging.getLogger("bentoml.pixelcnn")

RETRY_AFTER_S = (3, 8)  # drawn anew for each: those who were refused together do not come back together
HEALTH_CHECKS = ("/healthz", "/livez", "/readyz")
TOKEN_VARIABLE = "PIXELCNN_TOKEN"


def setting(name: str, default: int) -> int:
    """Return a whole number of at least 1 from the environment.

    Raises:
        ValueError: the variable holds something else.
    """
    text = os.environ.get(name, "").strip() or str(default)
    if not (text.isascii() and text.isdecimal() and int(text) >= 1):
        raise ValueError(f"{name} must be a whole number of at least 1, got {quoted(text)}. Set it anew.")
    return int(text)


MAX_REQUESTS = setting("PIXELCNN_MAX_REQUESTS", 64)
SEND_TIMEOUT_S = setting("PIXELCNN_SEND_TIMEOUT_S", 30)


def quoted(value: Any) -> str:
    """Return a value from a request for an error message: short, and in ASCII, so that it can always be sent."""
    try:
        text = ascii(value)
    except RecursionError:
        text = "something of many layers"
    return text if len(text) <= 60 else f"{text[:57]}..."


def has_length(scope: Scope) -> bool:
    """Say whether a request states the length of its body."""
    return any(name == b"content-length" for name, _ in scope["headers"])


class Gate:
    """Let requests in, within bounds; give every error the form `{"error": sentence}`.

    Args:
        app: what answers.
        token: what the header `Authorization: Bearer ...` must hold, health checks apart; empty for an open service.
    """

    def __init__(self, app: ASGIApp, token: str = "") -> None:
        self.app = app
        self.token = token
        self.num_active = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        if not self._may_enter(scope):
            text = f"this service wants a token: send the header Authorization: Bearer with its {TOKEN_VARIABLE}."
            return await _refusal(401, text, {"WWW-Authenticate": "Bearer"})(scope, receive, send)
        if scope["method"] != "POST":
            return await self._answer(scope, receive, send)
        if self.num_active >= MAX_REQUESTS:
            text = f"the service is busy with {self.num_active} requests: send this one again in a few seconds."
            return await _refusal(429, text)(scope, receive, send)
        self.num_active += 1
        try:
            await self._while_connected(scope, receive, send)
        finally:
            self.num_active -= 1

    def _may_enter(self, scope: Scope) -> bool:
        if not self.token or scope["path"] in HEALTH_CHECKS:
            return True
        sent = dict(scope["headers"]).get(b"authorization", b"")
        # In a time that tells nothing of how much of it is right.
        return hmac.compare_digest(sent, b"Bearer " + self.token.encode())

    async def _while_connected(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer, unless the client leaves, or does not take what it asked for."""
        read, stuck = asyncio.Event(), asyncio.Event()
        has_begun = False

        async def receive_part() -> Message:
            message = await receive()
            if message["type"] == "http.disconnect" or not message.get("more_body"):
                read.set()
            return message

        async def send_in_time(message: Message) -> None:
            nonlocal has_begun
            has_begun = True
            # Who was refused in mid-request and never said where it ends would go on sending it.
            if message["type"] == "http.response.start" and not read.is_set() and not has_length(scope):
                message = {**message, "headers": [*message["headers"], (b"connection", b"close")]}
            try:
                async with asyncio.timeout(SEND_TIMEOUT_S):
                    await send(message)
            except TimeoutError:
                logger.warning("a client took nothing for %g s: its answer was cut off.", SEND_TIMEOUT_S)
                stuck.set()
                await asyncio.Event().wait()  # until this is cancelled

        async def leave() -> None:
            await read.wait()
            while (await receive())["type"] != "http.disconnect":
                pass

        answer = asyncio.create_task(self._answer(scope, receive_part, send_in_time))
        ends = [asyncio.create_task(leave()), asyncio.create_task(stuck.wait())]
        try:
            await asyncio.wait((answer, *ends), return_when=asyncio.FIRST_COMPLETED)
            if answer.done():
                await answer
                return
            answer.cancel()
            await asyncio.wait((answer,))
            if not has_begun:  # Nobody reads this, but BentoML's own timer waits for an answer.
                await _refusal(499, "the client has left.")(scope, receive, send)
        finally:
            for task in (answer, *ends):
                task.cancel()

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        error: Message | None = None
        body = b""

        async def send_or_hold(message: Message) -> None:
            nonlocal error, body
            if message["type"] == "http.response.start" and message["status"] >= 400:
                error = message
            elif error is None:
                await send(message)
            else:
                body += message.get("body", b"")
                if not message.get("more_body"):
                    status = error["status"]
                    kept = {k.decode(): v.decode() for k, v in error["headers"] if k.lower() in (b"allow", b"server")}
                    await _refusal(status, _text(scope, status, body), kept)(scope, receive, send)

        has_begun = False

        async def send_and_tell(message: Message) -> None:
            nonlocal has_begun
            has_begun = True
            await send_or_hold(message)

        try:
            await self.app(scope, receive, send_and_tell)
        except Exception:
            # BentoML would wait for an answer until its time is up.
            logger.exception("a request failed")
            if not has_begun:
                await _refusal(500, "the service failed: its log says why.")(scope, receive, send)


def _refusal(status: int, text: str, headers: dict[str, str] | None = None) -> JSONResponse:
    retry = {"Retry-After": str(random.randint(*RETRY_AFTER_S))} if status in (429, 503) else {}
    return JSONResponse({"error": text}, status, {**(headers or {}), **retry})


def _text(scope: Scope, status: int, body: bytes) -> str:
    """Return the sentence of an error that the service or BentoML made."""
    if status == HTTPStatus.NOT_FOUND and not body.startswith((b"[", b"{")):
        return f"there is nothing at {quoted(scope['path'])}: /docs.json lists what there is."
    if status == HTTPStatus.METHOD_NOT_ALLOWED:
        return f"{quoted(scope['path'])} does not take {quoted(scope['method'])}: /docs.json says what it takes."
    try:
        values = json.loads(body)
        # BentoML wraps its own exceptions' text into a list.
        return str((values[0] if isinstance(values, list) else values)["error"])
    except (ValueError, LookupError, TypeError):
        return f"the request failed: {HTTPStatus(status).phrase}."
