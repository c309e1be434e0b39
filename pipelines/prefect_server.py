"""`prefect server start`, answering to its own names alone: 127.0.0.1, localhost, and the host of PREFECT_API_URL.

    python -m pipelines.prefect_server --host 0.0.0.0 --port 4200

Prefect checks neither the `Host` of a request nor the `Origin` of a WebSocket. Any page that a browser here shows could
read events and send some; one that makes its own name point to 127.0.0.1, run commands as the worker's user.
"""

import sys
from typing import Any
from urllib.parse import urlsplit

import uvicorn
from prefect.cli import app as prefect
from prefect.settings import PREFECT_API_URL, PREFECT_SERVER_CORS_ALLOWED_ORIGINS
from starlette.datastructures import Headers
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.types import ASGIApp, Receive, Scope, Send


class OwnOrigins:
    """Refuses a WebSocket that a page of another origin opens: browsers let it, and CORS does not apply."""

    def __init__(self, app: ASGIApp) -> None:
        self.app, self.allowed = app, PREFECT_SERVER_CORS_ALLOWED_ORIGINS.value().split(",")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        origin = Headers(scope=scope).get("origin") if scope["type"] == "websocket" else None
        if origin is None or origin in self.allowed or origin.partition("://")[2] == Headers(scope=scope).get("host"):
            await self.app(scope, receive, send)
        else:
            await send({"type": "websocket.close", "code": 1008})


def main() -> None:
    if {"-b", "--background"} & set(sys.argv):
        sys.exit("error: in the background Prefect's server would answer to every name. Run it without.")
    host = urlsplit(PREFECT_API_URL.value() or "").hostname or "localhost"
    hosts = ["127.0.0.1", "localhost", f"[{host}]" if ":" in host else host]
    run: Any = uvicorn.run
    # Around the app, not in it: Prefect's services ask that app themselves, by a name of their own.
    uvicorn.run = lambda app, **options: run(TrustedHostMiddleware(OwnOrigins(app), hosts), **options)
    sys.argv = ["prefect", "server", "start", *sys.argv[1:]]
    prefect()


if __name__ == "__main__":
    main()
