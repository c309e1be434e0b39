"""Who may open a page's WebSocket."""

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send


class OwnOrigin:
    """Refuses a WebSocket that a page of another origin opens.

    So does Streamlit, but not before it has asked the Internet for this machine's address: all visits wait for that.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = Headers(scope=scope) if scope["type"] == "websocket" else {}
        if "origin" in headers and headers["origin"].partition("://")[2] != headers.get("host"):
            await send({"type": "websocket.close", "code": 1008})
        else:
            await self.app(scope, receive, send)
