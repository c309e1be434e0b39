"""Endings on the shortest way: the browser asks for those of a stroke itself, no page runs until they have come.

`live.js` sends the drawing to LIVE_PATH of the canvas's own server, which has the service finish it and sends what to
show, row by row. The page runs then, and finds the endings in its visit; where this way fails it goes the long one.
"""

import asyncio
import functools
import json
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

import streamlit as st
from pydantic import BaseModel, ValidationError
from starlette.requests import ClientDisconnect
from starlette.requests import Request as HttpRequest
from starlette.responses import Response, StreamingResponse

from app.canvas.drawing import drawing_text, parse_drawing
from app.canvas.endings import Endings, Settings, asked_of
from app.canvas.rendering import endings_html
from app.canvas.session import VISITS, Visit
from app.canvas.texts import SPOKEN
from app.canvas.waiting import begin, drawn

HERE = Path(__file__).parent
LIVE_PATH = "/live"
MAX_BYTES = 2**20  # of what is sent; the largest drawing has a tenth of them
BODY_TIMEOUT_S = 10.0


class Stroke(BaseModel):
    """What the browser sends."""

    visit: str
    drawing: str  # the text of the grid
    fresh: bool = False  # the grid was blank before: this is another drawing


def live_path() -> str:
    """Return LIVE_PATH below the path that the whole canvas is served under."""
    base = str(st.get_option("server.baseUrlPath") or "").strip("/")
    return f"/{base}{LIVE_PATH}" if base else LIVE_PATH


def live_endings(visit: Visit, settings: Settings, last: Endings | None, is_on: bool) -> None:
    """Show the endings that come without the page, in place of `last`, the page's, as long as they are newer."""
    component = st.components.v2.component("live_endings", js=(HERE / "live.js").read_text(), isolate_styles=False)
    data: dict[str, Any] = {"url": live_path(), "visit": visit.name, "pending": visit.pending, "on": is_on}
    data["settings"] = repr((settings.query, settings.seed, settings.coloured, visit.order))
    data["drawing"] = last.drawing if last else ""
    component(key="live_endings", data=data, on_came_change=lambda: None)


async def answer_live(request: HttpRequest) -> Response:
    """Answer a stroke with events of what to show: {"html": of the endings, "finished": whether they are all of it}.

    204 says that there is nothing to show anew; 4xx that this way is closed.
    """
    length = request.headers.get("content-length", "")
    if not length.isdecimal() or int(length) > MAX_BYTES:
        return Response("Send a drawing, of at most 1 MiB, and its length.", status_code=413)
    try:
        async with asyncio.timeout(BODY_TIMEOUT_S):
            body = await request.body()
        stroke = Stroke.model_validate_json(body)
    except TimeoutError:
        return Response("Send it in one go.", status_code=408)
    except (ValidationError, ClientDisconnect):  # who has left hears nothing
        return Response("Send JSON: {visit, drawing, fresh}.", status_code=400)
    visit = VISITS.get(stroke.visit)
    settings = visit.settings if visit else None  # read once: the page may change them meanwhile
    if visit is None or settings is None:
        return Response("Nobody has a page open under this name. Reload it.", status_code=404)
    drawing = parse_drawing(stroke.drawing, settings.shape)
    visit.drawn[settings.shape] = drawing_text(drawing)
    if stroke.fresh:
        visit.seed = None
    asked = asked_of(drawing, settings, visit.own_seed())
    if not drawing.mark.any() or asked.known.all() or visit.is_ending(asked) or asked.request == visit.answered:
        return Response(status_code=204)
    visit.stop_live()
    visit.asked = asked.request
    SPOKEN.set(visit.language)
    return StreamingResponse(
        _events(visit, settings, asked), media_type="text/event-stream", headers={"Cache-Control": "no-store"}
    )


async def _events(visit: Visit, settings: Settings, asked: Endings) -> AsyncGenerator[str, None]:
    loop = asyncio.get_running_loop()
    endings: asyncio.Queue[object] = asyncio.Queue()
    ask_for = functools.partial(drawn, visit.client, asked)
    leaving = begin(ask_for, lambda event: loop.call_soon_threadsafe(endings.put_nowait, event))
    visit.stop_live, visit.live_for = leaving.leave, (settings.query, settings.seed)
    try:
        # An error ends the answer early: the page asks again, and says why.
        while isinstance(ending := await endings.get(), Endings) and not leaving.left:
            is_finished = ending.log_probs is not None
            visit.live, visit.unfinished = (ending, None) if is_finished else (None, ending)
            shown = {"html": endings_html(ending, settings.coloured, visit.order), "finished": is_finished}
            yield f"data: {json.dumps(shown)}\n\n"
    finally:  # also when the browser has left, for the next stroke
        leaving.leave()
        if visit.stop_live == leaving.leave:  # no newer one is on its way
            visit.live_for = None
