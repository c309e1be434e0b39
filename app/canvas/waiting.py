"""How a page waits for the service: still able to be redrawn, with a button to stop."""

import contextlib
import math
import queue
import threading
import time
from collections.abc import Callable, Generator
from dataclasses import dataclass, replace
from typing import Any, NoReturn, TypeVar

import numpy as np
import streamlit as st
from streamlit.runtime.scriptrunner import get_script_run_ctx
from streamlit.runtime.scriptrunner_utils.script_requests import ScriptRequestType
from streamlit.runtime.scriptrunner_utils.script_run_context import ThreadState

from app.canvas.endings import Endings
from app.canvas.texts import say
from app.client import OnOpen, Rows, ServiceClient, ServiceError

Event = TypeVar("Event")
AskFor = Callable[[OnOpen], Generator[Event, None, None]]
WAIT_S = 0.01  # how often a page that waits looks whether it is to be redrawn
SHOW_S = 0.06  # at most this often are unfinished images shown anew
END = object()


@dataclass
class Leaving:
    """How one leaves a request that another thread waits for: at once, or as soon as there is something to end."""

    left: bool = False
    end: Callable[[], None] = lambda: None

    def on_open(self, end: Callable[[], None]) -> None:
        """Take what ends the request: an `OnOpen` of the client."""
        self.end = end
        if self.left:
            end()

    def leave(self) -> None:
        self.left = True
        self.end()


def begin(ask_for: AskFor[Event], put: Callable[[Any], object]) -> Leaving:
    """Have another thread `put` the events that it asks for, at last END or what they raise; return how to leave it.

    `ask_for` returns the events, and may tell what ends them while they are waited for.
    """
    leaving = Leaving()

    def ask() -> None:
        try:
            with contextlib.closing(ask_for(leaving.on_open)) as events:  # ends the request
                for event in events:
                    put(event)
                    if leaving.left:
                        break
            put(END)
        except Exception as error:  # it is raised where it is awaited
            put(error)

    threading.Thread(target=ask, daemon=True).start()
    return leaving


def once(ask: Callable[[], Event]) -> AskFor[Event]:
    """Return what asks for a single answer, as `begin` takes it."""

    def ask_for(_: OnOpen) -> Generator[Event, None, None]:
        yield ask()

    return ask_for


def in_background(ask_for: AskFor[Event]) -> Generator[Event | None, None, None]:
    """Yield the events of another thread, and None whenever nothing has come for a moment.

    A page is redrawn, or stopped, when it next calls Streamlit: `look_up` at each None keeps it responsive while a
    service is slow. For `ask_for` see `begin`; leaving the generator ends the events, and drops what still comes.
    Raises what the events raise.
    """
    answers: queue.Queue[Any] = queue.Queue()
    leaving = begin(ask_for, answers.put)
    try:
        while True:
            event = None
            with contextlib.suppress(queue.Empty):
                event = answers.get(timeout=WAIT_S)
            if event is END:
                return
            if isinstance(event, Exception):
                raise event
            yield event
    finally:
        leaving.leave()


def busy_line(what: str, text: str, on_stop: Callable[[], None] | None) -> None:
    """Say by a text what the model does, `what` for short; offer to stop it, if it can be. Unseen at first."""
    with st.container(key=f"busy-{what}", horizontal=True, vertical_alignment="center"):
        st.markdown(text)
        if on_stop is not None:
            st.button(say("stop"), on_click=on_stop, key=f"stop-{what}", width="content")


def redraw() -> NoReturn:
    """Leave this run here, and run the fragment again, or the page if it is the page that runs."""
    run = get_script_run_ctx()
    st.rerun(scope="fragment" if run and run.fragment_ids_this_run else "app")


def look_up() -> None:
    """Leave this run here, by an exception of Streamlit's, if the page or its fragment is to be redrawn or stopped.

    Each read of the session's state does so; showing something would, too, but costs the browser a frame.
    """
    st.session_state.get("visit")
    if ThreadState.get().fragment_id in waiting_fragments():
        redraw()


def waiting_fragments() -> list[str]:
    """Return which fragments are to run once this run has ended: it is not ended for them, and no public way tells."""
    run = get_script_run_ctx()
    requests = run.script_requests if run else None
    if requests is None or requests._state != ScriptRequestType.RERUN:
        return []
    return requests._rerun_data.fragment_id_queue


def wait_for(
    ask_for: AskFor[Event],
    what: str,
    text: str,
    on_stop: Callable[[], None] | None = None,
    show: Callable[[Event], object] | None = None,
) -> list[Event]:
    """Return what the service answers, or give it to `show` as it comes, and return none. Raises ServiceError.

    Meanwhile the page says that it takes a while. It may leave this at any moment, also after the last answer: what
    must not be lost is for `show` to keep. For `ask_for` see `begin`: requests that it sends one by one end once the
    page has left; for `what`, `text` and `on_stop` see `busy_line`.
    """
    found: list[Event] = []
    take = show or found.append
    place = st.empty()
    with place:
        busy_line(what, text, on_stop)
    try:
        # Streamlit leaves this block by an exception when the page is to be redrawn: closing then ends the request.
        with contextlib.closing(in_background(ask_for)) as answers:
            for answer in answers:
                if answer is not None:
                    take(answer)
                look_up()
    finally:
        place.empty()
    return found


def drawn(client: ServiceClient, asked: Endings, on_open: OnOpen) -> Generator[Endings, None, None]:
    """Have the endings drawn that are asked for; yield them as rows come, finished at last. Raises ServiceError."""
    images, shown_at = asked.images.copy(), -math.inf  # (N, H, W) or (N, H, W, 3)
    with contextlib.closing(client.complete_stream(**vars(asked.request), on_open=on_open)) as events:
        for event in events:
            if isinstance(event, Rows):
                rows: np.ndarray = np.array(event.rows)  # (N, rows, W) or (N, rows, W, 3)
                if rows.max() >= asked.levels:
                    text = "A champion of more levels has just taken this one's place. Ask again in a few seconds."
                    raise ServiceError(text, away=True)
                images[:, event.start : event.start + rows.shape[1]] = rows
                now = time.monotonic()
                if now - shown_at >= SHOW_S or event.start + rows.shape[1] == images.shape[1]:
                    shown_at = now
                    yield replace(asked, images=images.copy())
            else:
                scored = replace(asked, log_probs=event.log_probs, seed=event.seed, model=event.model)
                yield replace(scored, images=np.array(event.completions))
