"""One line of the log for each request, as JSON, under an ID that its client knows, too; nothing of what was drawn.

A line has `request_id`, `method`, `path`, `status`, `seconds`; where a model answered `dataset` and `version`; where it
computed `waited_s`, before its call began. A stream that ends in an error has that error's status. Health checks and
/metrics have none.
"""

import json
import logging
import re
import secrets
import time
from collections.abc import Collection
from contextvars import ContextVar
from datetime import UTC, datetime
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.service.metrics import metrics
from app.service.operation.readiness import draining
from app.service.settings import QUIET, settings

logger = logging.getLogger("bentoml.pixelcnn.requests")

ID_HEADER = "x-request-id"
ID = re.compile(r"[A-Za-z0-9._:-]{1,64}")
MAX_LOGGED = 60  # characters of a method, and of a path

line_of_request: ContextVar[dict[str, Any]] = ContextVar("line_of_request")  # of the one that is being answered


class JsonFormatter(logging.Formatter):
    """A record as one line of JSON; a request's values beside its message, and its ID beside whatever it logs."""

    def format(self, record: logging.LogRecord) -> str:
        at = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        values = {"time": at, "level": record.levelname, "message": record.getMessage()}
        line = line_of_request.get({})
        values |= getattr(record, "line", {"request_id": line["request_id"]} if line else {})
        if record.exc_info:
            values["exception"] = self.formatException(record.exc_info)
        return json.dumps(values)


class RequestLog:
    """Name, time, count and log each request: an ASGI middleware, the outermost of ours."""

    def __init__(self, app: ASGIApp, paths: Collection[str]) -> None:
        self.app = app
        self.paths = paths  # counted by their name; others are one, or clients could create time series

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        sent = Headers(scope=scope).get(ID_HEADER, "")
        line: dict[str, Any] = {"request_id": sent if ID.fullmatch(sent) else secrets.token_hex(8)}
        line |= {name: scope[name][:MAX_LOGGED] for name in ("method", "path")}
        line_of_request.set(line)
        start = time.perf_counter()
        status = 0

        async def send_named(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                headers[ID_HEADER] = line["request_id"]
                if draining.is_set():  # the next request of this connection is for another service
                    headers["connection"] = "close"
            await send(message)

        try:
            await self.app(scope, receive, send_named)
        finally:
            seconds = time.perf_counter() - start
            # Without a status BentoML has cancelled it, which then answers by itself: its time was up.
            # A stream notes how it failed, after it had begun as 200.
            status = line.pop("status", status) or 504
            path = scope["path"]
            if settings.watch and path not in QUIET:
                metrics().requests.labels(path if path in self.paths else "other", str(status)).inc()
                logger.info("request", extra={"line": {**line, "status": status, "seconds": round(seconds, 4)}})
